"""What a reader must give for every sample; what breaks it is told with the reader, the sample and both sides."""

import torch
from torch import Tensor

from mmpre.data.sample import BadMember, Sample
from mmpre.modality import Reader
from mmpre.tokens import Ragged, Tokens

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class AdapterError(ValueError):
    """A reader that does not keep to the protocol: a mistake in its code, not in the data."""


def check_tokens(tokens: Tokens, role: str, reader: Reader, sample: Sample) -> None:
    """Raise AdapterError for what is no row of tokens, and BadMember for numbers that are not finite."""

    def refuse(wanted: str, came: object) -> None:
        raise AdapterError(
            f"{type(reader).__name__} (role {role!r}), sample {sample.key!r} of {sample.shard}: wanted {wanted}, "
            f"got {came}; mend the reader's tokenize"
        )

    if not isinstance(tokens, Tokens):
        refuse("Tokens (see Tokens.of_row)", type(tokens).__name__)
    special_N = tokens.special_N
    if not isinstance(special_N, Tensor) or special_N.ndim != 1 or special_N.dtype not in _INTEGERS:
        refuse("special_N as whole numbers of shape [N]", _told(special_N))
    if tokens.lengths_B.tolist() != [len(special_N)]:
        refuse(f"lengths_B [{len(special_N)}], as many as special_N has", tokens.lengths_B.tolist())
    for name, field in tokens.fields.items():
        if not isinstance(field, Ragged) or not isinstance(field.values, Tensor) or field.values.ndim < 1:
            refuse(f"field {name!r} as a tensor of at least one dimension", _told(getattr(field, "values", field)))
        if field.lengths_B.tolist() != [len(field.values)]:
            refuse(f"lengths_B [{len(field.values)}] of field {name!r}, as it has values", field.lengths_B.tolist())
        if field.refers_to is not None and field.refers_to != "tokens" and field.refers_to not in tokens.fields:
            refuse(f"field {name!r} to refer to one of {sorted(tokens.fields)} or to tokens", repr(field.refers_to))
        if field.values.is_floating_point() and not field.values.isfinite().all():
            member = next((suffix for suffix in reader.suffixes if suffix in sample.members), "|".join(reader.suffixes))
            detail = f"{type(reader).__name__} made NaN or infinity of it (field {name!r}); look at the file"
            raise BadMember("not finite", member, detail)


def _told(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
