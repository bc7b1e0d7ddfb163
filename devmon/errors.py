"""The errors a user of devmon can meet: each says what was expected, what came and what to do."""


class DevmonError(Exception):
    """Any error that devmon raises on purpose; the command line prints it as one line."""


class InstrumentError(DevmonError):
    """An instrument cannot measure this model or this data, and says what it would need."""


class StoreError(DevmonError):
    """A trajectory cannot be opened, read or written as asked."""


class IdentityError(StoreError):
    """What would be stored is not what the trajectory holds: another configuration, other weights, other labels."""


class DataError(DevmonError):
    """Input data (a text, a batch, a table) is missing, empty or of the wrong form."""
