"""The errors users see. Every message says what is wrong and ends with what to do about it."""


class PostgradError(ValueError):
    """Base of every error meant for users; `exit_code` is what the command line returns."""

    exit_code = 1
    """0 done, 1 failed, 2 usage or config, 3 refused by a check, 4 gate not met, 130 stopped."""

    def __init__(self, message: str, remedy: str) -> None:
        """Keep `message` (what is wrong) and `remedy` (what to do) apart for renderers."""
        super().__init__(f"{message}\n  -> {remedy}")
        self.message = message
        self.remedy = remedy


class ConfigError(PostgradError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class DataError(PostgradError):
    """Rows that cannot be used as they are; lists all of them, not only the first."""

    exit_code = 3


class PreflightError(PostgradError):
    """A check on the user's own rows, model or machine refused to go on."""

    exit_code = 3


class SourceError(PostgradError):
    """A file, hub id or package could not be found, fetched or verified."""


class ModelError(PostgradError):
    """A model, tokenizer or adapter that cannot be loaded or used."""


class TrainingError(PostgradError):
    """Training cannot go on or its result not be trusted (non-finite loss, drift, bad restore)."""


class CheckpointError(PostgradError):
    """A checkpoint is missing, damaged or belongs to another recipe."""


class RunError(PostgradError):
    """A run directory cannot be created, locked, resumed or read."""


class Interrupted(PostgradError):
    """Stopped by the user; the checkpoint was saved first."""

    exit_code = 130
