"""anonfw: train, measure and run face anonymization. Nothing heavy is imported here, so that `--help` stays instant."""

__version__ = "0.1.0"
