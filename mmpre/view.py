"""How a task wants its rows made, in the loading worker."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from mmpre.attention import Attend, Full
from mmpre.attention.by_tokens import PerRow
from mmpre.batch import Picked, Row, check_alike
from mmpre.data.contract import check_tokens
from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw, Draws
from mmpre.labels import NONE, Label
from mmpre.masking.protocol import Borrower, Corrupted, Corruption, Mask, SampleMask, untouched
from mmpre.modality import Reader
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class OtherSample:
    """Take a role's tokens from another sample for a share of the rows, chosen by the data order (never a neighbour).

    The other sample must differ in what the role's reader reads, or in what that of the role `differs_in` reads: a text
    of another picture, not another text of the same. After `tries` equal ones the row stays as it is.
    Sets the row's label `label` to 1 where the roles belong together and to 0 where they do not.
    """

    share: float
    differs_in: str | None = None
    label: str = "matched"
    tries: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"OtherSample: share must lie between 0 and 1, got {self.share}; half is 0.5")


@dataclass(frozen=True)
class Read:
    """A row whose tokens are read, and nothing is picked of them yet. `lend(role)` gives another sample's tokens."""

    key: str
    clean: Mapping[str, Tokens]
    labels: Mapping[str, torch.Tensor]
    sources: Mapping[str, Sample]
    lend: Callable[[str], Callable[[], Tokens]]
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class View:
    """Picks by name, what hides them, who may attend to whom, and which roles come from another sample.

    `corruption` serves every pick of this view, or each pick by name. A pick without one stays visible.
    `readers` read some roles in this view in place of the objective's own, such as with another augmentation.
    `labels` gives rows a number of their sample's, such as an answer; a row with a role of another sample has none.
    `cuts` add fields to a role's tokens once they are read, such as units that are picked together (masking/units.py).
    `roles` limits the view to some of the objective's roles; None means all of them.
    """

    readers: Mapping[str, Reader] = field(default_factory=dict)
    cuts: Mapping[str, Callable[[Tokens, Draw], Tokens]] = field(default_factory=dict)
    picks: Mapping[str, Mask | SampleMask] = field(default_factory=dict)
    corruption: Corruption | Mapping[str, Corruption] | None = None
    donors: Mapping[str, OtherSample] = field(default_factory=dict)
    labels: Mapping[str, Label] = field(default_factory=dict)
    attend: Attend = field(default_factory=Full)
    roles: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        labels = [one.label for one in self.donors.values()] + list(self.labels)
        if twice := sorted({one for one in labels if labels.count(one) > 1}):
            raise ValueError(
                f"View: two of its donors and labels write {', '.join(twice)}; give each a label of its own"
            )

    def row(
        self, sample: Sample, readers: Mapping[str, Reader], draw: Draw, donor: Callable[[str, int], Sample]
    ) -> Row:
        """Make one row. `donor(role, k)` reads the k-th other sample that the data order offers for this row."""
        return self.mask(self.read(sample, readers, draw, donor))

    def read(
        self, sample: Sample, readers: Mapping[str, Reader], draw: Draw, donor: Callable[[str, int], Sample]
    ) -> Read:
        """The first half of `row`: all that reads a sample. `mask` and `masked` do the rest."""
        clean, labels, sources = {}, {}, {}
        readers = {role: self.readers.get(role, reader) for role, reader in readers.items()}
        for role, reader in readers.items():
            if self.roles is not None and role not in self.roles:
                continue
            source = sample
            if role in self.donors:
                source, matched = self._source(role, readers, sample, draw, donor)
                labels[self.donors[role].label] = torch.tensor(matched)
            sources[role] = source
            clean[role] = self._read(role, reader, source, draw.child("tokenize", role))
        whole = all(source is sample for source in sources.values())
        for name, label in self.labels.items():
            labels[name] = torch.tensor(label(sample, draw.child("label", name)) if whole else NONE)

        def lend(role: str) -> Callable[[], Tokens]:
            named = f"lent {role}"
            return lambda: self._read(role, readers[role], donor(named, 0), draw.child("tokenize", named))

        return Read(sample.key, clean, labels, sources, lend, draw)

    def _read(self, role: str, reader: Reader, source: Sample, draw: Draw) -> Tokens:
        try:
            tokens = reader.tokenize(source, draw)
        except BadMember as e:
            e.sample = source  # another than the row's own, maybe
            raise
        check_tokens(tokens, role, reader, source)
        return self.cuts[role](tokens, draw.child("cut")) if role in self.cuts else tokens

    def _source(
        self, role: str, readers: Mapping[str, Reader], sample: Sample, draw: Draw,
        donor: Callable[[str, int], Sample],
    ) -> tuple[Sample, int]:  # fmt: skip
        wish = self.donors[role]
        if draw.uniform("donor", role) >= wish.share:
            return sample, 1
        suffixes = readers[wish.differs_in or role].suffixes
        own = [sample.members.get(suffix) for suffix in suffixes]
        for k in range(wish.tries):
            other = donor(role, k)
            if [other.members.get(suffix) for suffix in suffixes] != own:
                return other, 0
        return sample, 1

    def mask(self, read: Read) -> Row:
        masks = {n: m.of(read.sources[m.role]) if _can(m, SampleMask) else m for n, m in self.picks.items()}
        seen, picked = self._hidden(read.clean, masks, read.draw, read.lend)
        return Row(
            key=read.key, clean=read.clean, picked=picked, labels=read.labels,
            seen={role: one.tokens for role, one in seen.items()},
            replaced={role: one.replaced_N for role, one in seen.items()},
        )  # fmt: skip

    @property
    def at_once(self) -> bool:
        """Whether `masked` may be given several rows: whether all masks and corruptions take them together."""
        parts = [*self.picks.values()]
        parts += self.corruption.values() if isinstance(self.corruption, Mapping) else [self.corruption]
        return all(getattr(part, "at_once", False) for part in parts if part is not None)

    def masked(self, rows: Sequence[Read]) -> list[Row]:
        """What `mask` makes of each row, in a fraction of the time; for a view that is `at_once`."""
        check_alike(rows, list(rows[0].clean))
        clean = {role: Tokens.pack([row.clean[role] for row in rows]) for role in rows[0].clean}
        seen, picked = self._hidden(clean, self.picks, Draws.of([row.draw for row in rows]))
        tokens = {role: one.tokens.split() for role, one in seen.items()}
        replaced = {role: one.replaced_N.split(one.tokens.lengths_B.tolist()) for role, one in seen.items()}
        picks = {
            name: one.split(clean[one.role].lengths_B, seen[one.role].tokens.lengths_B) for name, one in picked.items()
        }
        return [
            Row(
                key=row.key, clean=row.clean, labels=row.labels,
                seen={role: parts[i] for role, parts in tokens.items()},
                replaced={role: parts[i] for role, parts in replaced.items()},
                picked={name: parts[i] for name, parts in picks.items()},
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip

    def _hidden(
        self, clean: Mapping[str, Tokens], masks: Mapping[str, Mask], draw: Draw | Draws,
        lend: Callable[[str], Callable[[], Tokens]] | None = None,
    ) -> tuple[dict[str, Corrupted], dict[str, Picked]]:  # fmt: skip
        """What is seen of each role, and what is picked, of one row or of several."""
        seen = {role: untouched(tokens) for role, tokens in clean.items()}
        index = {name: mask(clean[mask.role], draw.child("pick", name)) for name, mask in masks.items()}
        corrupted: dict[str, str] = {}
        for name, mask in masks.items():
            corruption = self.corruption.get(name) if isinstance(self.corruption, Mapping) else self.corruption
            if corruption is None:
                continue
            if mask.role in corrupted:
                raise ValueError(
                    f"View: picks {corrupted[mask.role]!r} and {name!r} both corrupt role {mask.role!r}; "
                    "one corruption a role and view: join the masks, or give one of them no corruption"
                )
            corrupted[mask.role] = name
            if lend is not None and _can(corruption, Borrower):
                corruption = corruption.borrowing(lend(mask.role))
            seen[mask.role] = corruption(clean[mask.role], index[name], draw.child("corrupt", name))
        picked = {}
        for name, mask in masks.items():
            moved = seen[mask.role].index_map
            picked[name] = Picked(mask.role, index[name], index[name] if moved is None else moved[index[name]])
        for role, name in corrupted.items():
            picked |= {f"{name}.{more}": Picked(role, *places) for more, places in seen[role].also.items()}
        return seen, picked


@dataclass(frozen=True)
class Dealt:
    """Several views share the rows of a step: the i-th row is made by the view whose turn it is.

    `views` says, by name, how many rows in a row each makes before it is the next one's turn, so that shares are exact
    where a step's rows are a multiple of their sum. All views read the same roles and fields. A batch has the picks of
    all, with no token in the rows of other views, and the label `label`: the number of the view that made a row, by
    which each keeps its attend. GPT-BERT (Charpentier & Samuel 2024, arXiv:2410.24159): 15 masked rows, 1 causal one.
    """

    views: Mapping[str, tuple[int, View]]
    label: str = "view"

    def __post_init__(self) -> None:
        counts = {name: count for name, (count, _) in self.views.items()}
        picks = [pick for _, view in self.views.values() for pick in view.picks]
        if min(counts.values(), default=-1) < 0 or not sum(counts.values()) or len(set(picks)) != len(picks):
            raise ValueError(
                f"Dealt: wanted views with rows, none with fewer than 0, and picks of different names, got rows "
                f"{counts} and picks {picks}"
            )

    def row(
        self, sample: Sample, readers: Mapping[str, Reader], draw: Draw, donor: Callable[[str, int], Sample]
    ) -> Row:
        """Make one row, by the view whose turn it is at the draw's index."""
        return self.mask(self.read(sample, readers, draw, donor))

    def read(
        self, sample: Sample, readers: Mapping[str, Reader], draw: Draw, donor: Callable[[str, int], Sample]
    ) -> Read:
        turns = [number for number, (count, _) in enumerate(self.views.values()) for _ in range(count)]
        number = turns[draw.index % len(turns)]
        made = self._view(number).read(sample, readers, draw, donor)
        return replace(made, labels={**made.labels, self.label: torch.tensor(number)})

    def mask(self, read: Read) -> Row:
        return self._with_all_picks(self._view(int(read.labels[self.label])).mask(read))

    @property
    def at_once(self) -> bool:
        return all(view.at_once for _, view in self.views.values())

    def masked(self, rows: Sequence[Read]) -> list[Row]:
        numbers, made = [int(row.labels[self.label]) for row in rows], {}
        for number in set(numbers):
            mine = [i for i, one in enumerate(numbers) if one == number]
            made |= zip(mine, self._view(number).masked([rows[i] for i in mine]), strict=True)
        return [self._with_all_picks(made[i]) for i in range(len(rows))]

    def _view(self, number: int) -> View:
        return list(self.views.values())[number][1]

    def _with_all_picks(self, row: Row) -> Row:
        nothing = torch.empty(0, dtype=torch.int64)
        picked = {pick: Picked(mask.role, nothing, nothing) for pick, mask in self.picks.items()}
        return replace(row, picked=picked | row.picked)

    @property
    def attend(self) -> Attend:
        return PerRow(tuple(view.attend for _, view in self.views.values()), self.label)

    @property
    def picks(self) -> Mapping[str, Mask | SampleMask]:
        return {pick: mask for _, view in self.views.values() for pick, mask in view.picks.items()}

    @property
    def corruption(self) -> Mapping[str, Corruption | None]:
        """What hides each pick."""
        return {
            pick: view.corruption.get(pick) if isinstance(view.corruption, Mapping) else view.corruption
            for _, view in self.views.values()
            for pick in view.picks
        }

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {role: reader for _, view in self.views.values() for role, reader in view.readers.items()}

    @property
    def roles(self) -> tuple[str, ...] | None:
        return next(iter(self.views.values()))[1].roles


_known: dict[tuple[type, type], bool] = {}


def _can(one: object, what: type) -> bool:
    """isinstance with a protocol, asked once for each class: it takes 20 microseconds, and every row asks."""
    key = type(one), what
    if key not in _known:
        _known[key] = isinstance(one, what)
    return _known[key]
