"""The one error of the export."""


class ExportError(Exception):
    """The model was not exported, and nothing was written; the message says what was expected and what came."""
