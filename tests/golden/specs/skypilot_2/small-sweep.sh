#!/bin/bash
# Call it from moejax's folder, which every job is given a copy of.
set -e
specs=$(dirname "$0")
sky jobs launch --yes --async --detach-run "$specs/small-sweep-f37abf3a.yaml"  # seed=0
sky jobs launch --yes --async --detach-run "$specs/small-sweep-4ce6437b.yaml"  # seed=1_pattern=attention+dense
sky jobs launch --yes --async --detach-run "$specs/small-sweep-09443839.yaml"  # seed=2_files=a-b-s-HOME-x-.md
