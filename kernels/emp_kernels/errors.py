"""What a kernel can find wrong with a row, or with the machine."""

__all__ = ["DamagedRowError", "NoDeviceError", "NonFiniteRowError"]


class NonFiniteRowError(ValueError):
    """A row to prune holds NaN or infinity.

    Attributes:
        row: Its number within the row block.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} holds NaN or infinity")
        self.row = row


class DamagedRowError(ValueError):
    """A packed row contradicts itself.

    Attributes:
        row: Its number within the row block.
        fault: What is wrong with it.
    """

    def __init__(self, row: int, fault: str) -> None:
        super().__init__(f"row {row}: {fault}")
        self.row = row
        self.fault = fault


class NoDeviceError(RuntimeError):
    """There is no GPU, or none that the kernels can run on: the message says what is missing."""
