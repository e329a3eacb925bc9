"""The errors a user of QaRL can meet, by what they have to do next."""


class ConfigError(ValueError):
    """The configuration is wrong: the message names the dotted key, the value and the choices. Fix it and start again."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used: truncated, of another contract, or not there."""


class SyncError(RuntimeError):
    """The engine does not serve what the learner published. Generation must not go on."""


class LineLost(SyncError):
    """The other side of a transfer was gone before all of it had arrived."""


class EngineError(RuntimeError):
    """The engine cannot do what was asked, or died more often than it may be restarted."""


class LearnerError(RuntimeError):
    """A rank of the learner died. `resume=auto` continues from the newest checkpoint."""


class DivergenceError(RuntimeError):
    """Training has left the region in which its numbers mean anything. The state it happened in is saved, where it can be."""
