"""The config of a run that is there, such as one that scripts/convert.py began: --config=configs/of_run.py:runs/mixtral"""

import json
import pathlib

import ml_collections

from moejax import config


def get_config(workdir: str) -> ml_collections.ConfigDict:
    """`workdir` is that of the run."""
    text = (pathlib.Path(workdir).expanduser() / "config.json").read_text()
    return config.to_tree(config.from_dict(json.loads(text)))
