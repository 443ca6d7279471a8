"""What was asked for by a name that nothing has."""


class Absent(KeyError, ValueError):
    """A field, pick, label, view or modality that is not there; says what there is."""

    def __str__(self) -> str:
        return ValueError.__str__(self)  # KeyError shows its text in quotes
