"""Every option at its default, for tests of the command line."""

from moejax import config


def get_config():
    return config.default()
