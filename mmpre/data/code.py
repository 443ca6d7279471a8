"""Source code as tokens, comments and data flow, by tree-sitter's grammars. Nothing is run.

Data flow is a graph of occurrences of variables (and of literals): which occurrence's value comes from which others.
Source: GraphCodeBERT, Guo et al. 2020, arXiv:2009.08366; rules as in the authors' code, except that the body of a loop
is always read twice, also of one with an `else`, a C-style `for` and JavaScript's `for ... of`; that in Java and
JavaScript what was before an `if` with an `else` does not come out of it again, and that JavaScript's `=` assigns.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import tree_sitter

from mmpre.data.sample import BadMember

MAX_DEPTH = 1_000  # of a tree; what is written by people stays below 100
MAX_STEPS = 500_000  # in following the flow: nested loops double the work with each level
NO_TOKEN = -1


@dataclass(frozen=True)
class Language:
    """A grammar, and what its nodes are called that data flow asks for.

    `each` are loops over values: the node, and its fields for target, values and body.
    """

    suffix: str
    grammar: str  # the package that holds it
    comments: frozenset[str] = frozenset({"comment"})
    docstrings: bool = False  # whether a string that is a statement is a comment
    whole: frozenset[str] = frozenset({"string"})  # one token, whatever is inside
    blank: frozenset[str] = frozenset()  # no tokens, as white space is none
    definitions: frozenset[str] = frozenset({"variable_declarator"})
    assignments: frozenset[str] = frozenset()
    pairwise: bool = False  # whether a, b = c, d gives each its own
    increments: frozenset[str] = frozenset({"update_expression"})
    branches: frozenset[str] = frozenset({"if_statement"})
    alternatives: frozenset[str] = frozenset({"else_clause"})
    each: tuple[tuple[str, str, str, str], ...] = ()
    loops: frozenset[str] = frozenset({"for_statement", "while_statement", "do_statement"})
    generics: bool = False  # whether < may open something: what stays open costs the parser its square in memory
    clauses: frozenset[str] = frozenset()  # of comprehensions: they bind before the rest is read


PYTHON = Language(
    "py", "tree_sitter_python", docstrings=True, blank=frozenset({"line_continuation"}), pairwise=True,
    definitions=frozenset({"default_parameter"}), assignments=frozenset({"assignment", "augmented_assignment"}),
    increments=frozenset(), alternatives=frozenset({"elif_clause", "else_clause"}),
    each=(("for_statement", "left", "right", "body"),), loops=frozenset({"while_statement"}),
    clauses=frozenset({"for_in_clause"}),
)  # fmt: skip
JAVA = Language(
    "java", "tree_sitter_java", generics=True, comments=frozenset({"line_comment", "block_comment"}),
    whole=frozenset({"string_literal"}), assignments=frozenset({"assignment_expression"}),
    each=(("enhanced_for_statement", "name", "value", "body"),),
)  # fmt: skip
JAVASCRIPT = Language(
    "js", "tree_sitter_javascript", comments=frozenset({"comment", "html_comment", "hash_bang_line"}),
    assignments=frozenset({"assignment_expression", "augmented_assignment_expression", "assignment_pattern"}),
    each=(("for_in_statement", "left", "right", "body"),),
)  # fmt: skip
LANGUAGES = (PYTHON, JAVA, JAVASCRIPT)


@dataclass(frozen=True)
class Code:
    """Tokens (leaves of the tree, strings whole), the text of comments, and the flow between tokens.

    `flow` holds pairs (i, j), sorted: the value of token i comes from that of token j.
    """

    tokens: Sequence[str]
    comments: Sequence[str]
    flow: Sequence[tuple[int, int]]


@dataclass(slots=True)
class _Node:
    kind: str
    field: str | None
    first: int  # of its tokens
    last: int = NO_TOKEN  # of them, + 1
    children: list["_Node"] = field(default_factory=list)

    def named(self, name: str) -> "_Node | None":
        return next((child for child in self.children if child.field == name), None)


def read_code(text: str, language: Language, *, most_errors: float = 0.1) -> Code:
    """Read a program.

    Raises BadMember where more than the share `most_errors` of its bytes does not parse (stands in nodes that the
    grammar calls ERROR; a missing sign counts as one byte), where it is nested more than 1,000 deep, where following
    its flow takes too long, and where there is no code in it.
    """
    source = text.removeprefix("\ufeff").encode()
    if language.generics and max(part.count(b"<") for part in re.split(rb"[;{}]", source)) > MAX_DEPTH:
        detail = f"more than {MAX_DEPTH:,} signs < stand in one statement; leave it out"
        raise BadMember("nested too deeply", language.suffix, detail)
    tree = _Tree(source, language)
    if not tree.tokens:
        raise BadMember("no code", language.suffix, "there is no code in it, only white space or comments")
    total = sum(map(len, tree.tokens))
    if tree.wrong > most_errors * total:
        detail = (
            f"{tree.wrong / total:.0%} of it does not parse, at most {most_errors:.0%} may; is it .{language.suffix}?"
        )
        raise BadMember("not code", language.suffix, detail)
    return Code(tree.tokens, tree.comments, _Flow(tree, language).pairs())


@cache
def _parser(grammar: str) -> tree_sitter.Parser:
    try:
        module = importlib.import_module(grammar)
    except ImportError as e:
        name = grammar.replace("_", "-")
        raise ImportError(f"code: the grammar {grammar} is not installed ({e}); pip install {name}") from None
    return tree_sitter.Parser(tree_sitter.Language(module.language()))


class _Tree:
    """The parsed tree without comments and empty leaves; each node knows which tokens stand below it."""

    def __init__(self, source: bytes, language: Language) -> None:
        self.tokens: list[str] = []
        self.variable: list[bool] = []
        self.identifier: list[bool] = []
        self.comments: list[str] = []
        self.wrong = 0  # bytes that do not parse
        self._language = language
        self.root = self._read(source)

    def _read(self, source: bytes) -> _Node:
        """One walk by a cursor, without recursion: how deep a tree is must not matter."""
        cursor = _parser(self._language.grammar).parse(source).walk()
        path, in_error = [_Node("", None, 0)], 0
        while True:
            node = cursor.node
            kind, down = node.type, False
            if node.is_missing:
                self.wrong += 1
            elif kind in self._language.blank:
                pass
            elif kind in self._language.comments or (self._language.docstrings and _is_docstring(node, kind)):
                if said := _words_of(_text(source, node)):
                    self.comments.append(said)
            elif kind in self._language.whole or not node.child_count:
                self._add(_text(source, node), kind, cursor.field_name, path[-1], in_error + (kind == "ERROR"))
            else:
                made = _Node(kind, cursor.field_name, len(self.tokens))
                path[-1].children.append(made)
                path.append(made)
                in_error += kind == "ERROR"
                if len(path) > MAX_DEPTH:
                    detail = f"it is nested more than {MAX_DEPTH:,} deep; leave it out"
                    raise BadMember("nested too deeply", self._language.suffix, detail)
                down = cursor.goto_first_child()
            while not down and not cursor.goto_next_sibling():
                if not cursor.goto_parent():
                    path[0].last = len(self.tokens)
                    return path[0]
                done = path.pop()
                done.last = len(self.tokens)
                in_error -= done.kind == "ERROR"

    def _add(self, text: str, kind: str, field_name: str | None, parent: _Node, in_error: int) -> None:
        if not text.strip():
            return
        parent.children.append(_Node(kind, field_name, len(self.tokens), len(self.tokens) + 1))
        self.tokens.append(text)
        self.variable.append(kind not in (text, "ERROR"))
        self.identifier.append(kind == "identifier")
        if in_error:
            self.wrong += len(text.encode())


_State = dict[str, tuple[int, ...]]  # for each name, the tokens that last gave it its value


class _Flow:
    """Follows values through a tree. Generators that ask for their children take the place of recursion."""

    def __init__(self, tree: _Tree, language: Language) -> None:
        self._tokens, self._variable, self._identifier = tree.tokens, tree.variable, tree.identifier
        self._root, self._language = tree.root, language
        self._pairs: set[tuple[int, int]] = set()
        self._steps = 0
        self._parts = {kind: names for kind, *names in language.each}
        plain = dict.fromkeys
        self._ways = {
            **plain(language.definitions, self._define), **plain(language.assignments, self._assign),
            **plain(language.clauses, self._clause), **plain(language.increments, self._increment),
            **plain(language.branches, self._branch), **plain(self._parts, self._for_each),
            **plain(language.loops, self._loop),
        }  # fmt: skip

    def pairs(self) -> list[tuple[int, int]]:
        stack = [self._all(self._root, {})]
        while stack:
            for node, state in stack[-1]:
                self._count(1)
                if not node.children:
                    self._use(node, state)
                    continue
                stack.append(self._ways.get(node.kind, self._all)(node, state))
                break
            else:
                stack.pop()
        return sorted(self._pairs)

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            detail = (
                f"its data flow takes more than {MAX_STEPS:,} steps (loops in loops, long assignments); leave it out"
            )
            raise BadMember("flow too long", self._language.suffix, detail)

    def _use(self, node: _Node, state: _State) -> None:
        if node.last == node.first or not self._variable[node.first]:
            return
        i, name = node.first, self._tokens[node.first]
        if name in state:
            self._link([i], state[name])
        elif self._identifier[i]:
            state[name] = (i,)

    def _link(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        self._count(len(targets) * len(sources))
        self._pairs.update((i, j) for i in targets for j in sources)

    def _variables(self, node: _Node | None) -> list[int]:
        return [] if node is None else [i for i in range(node.first, node.last) if self._variable[i]]

    def _bind(self, target: _Node | None, value: _Node | None, state: _State) -> None:
        """Every name in the target comes from every variable in the value."""
        targets = self._variables(target)
        self._link(targets, self._variables(value))
        for i in targets:
            state[self._tokens[i]] = (i,)

    def _all(self, node: _Node, state: _State) -> Iterator[tuple[_Node, _State]]:
        for early in (True, False) if self._language.clauses else (False,):
            for child in node.children:
                if (child.kind in self._language.clauses) == early:
                    yield child, state

    def _define(self, node: _Node, state: _State) -> Iterator[tuple[_Node, _State]]:
        name, value = node.named("name"), node.named("value")
        if value is not None:
            yield value, state
        self._bind(name, value, state)

    def _assign(self, node: _Node, state: _State) -> Iterator[tuple[_Node, _State]]:
        pairs = self._sides(node.named("left"), node.named("right"))
        for _, value in pairs:
            yield value, state
        for target, value in pairs:
            self._bind(target, value, state)

    def _sides(self, left: _Node | None, right: _Node | None) -> list[tuple[_Node, _Node]]:
        """Targets and values: one by one where there are as many, otherwise all with all."""
        if left is None or right is None:  # an annotation assigns nothing
            return []
        sides = [[part for part in side.children if part.kind != ","] for side in (left, right)]
        if self._language.pairwise and len(sides[0]) == len(sides[1]) > 0:
            return list(zip(*sides, strict=True))
        return [(left, right)]

    def _clause(self, node: _Node, state: _State) -> Iterator[tuple[_Node, _State]]:
        yield node.children[-1], state
        self._bind(node.named("left"), node.children[-1], state)

    def _increment(self, node: _Node, state: _State) -> Iterator[tuple[_Node, _State]]:
        self._bind(node, node, state)
        yield from ()

    def _branch(self, node: _Node, state: _State) -> Iterator[tuple[_Node, _State]]:
        before, ends, otherwise = dict(state), [state], False
        for child in node.children:
            if child.kind == "else":  # Java has no node for the clause
                otherwise = True
            elif otherwise or child.kind in self._language.alternatives:
                otherwise = otherwise or child.kind == "else_clause"
                ends.append(dict(before))
                yield child, ends[-1]
            else:
                yield child, state
        if not otherwise:
            ends.append(before)
        names = {name for end in ends for name in end}
        self._count(sum(map(len, ends)))
        state.update({name: tuple(sorted({i for end in ends for i in end.get(name, ())})) for name in names})

    def _for_each(self, node: _Node, state: _State) -> Iterator[tuple[_Node, _State]]:
        target, values, body = (node.named(name) for name in self._parts[node.kind])
        pairs = self._sides(target, values)
        for _ in range(2):
            for _, value in pairs:
                yield value, state
            for one, value in pairs:
                self._bind(one, value, state)
            if body is not None:
                yield body, state
        if (after := node.named("alternative")) is not None:
            yield after, state

    def _loop(self, node: _Node, state: _State) -> Iterator[tuple[_Node, _State]]:
        for again in (False, True):
            for child in node.children:
                if not (again and child.field in ("init", "initializer")):
                    yield child, state


def _text(source: bytes, node: tree_sitter.Node) -> str:
    return source[node.start_byte : node.end_byte].decode("utf-8", "replace")


def _is_docstring(node: tree_sitter.Node, kind: str) -> bool:
    return kind == "expression_statement" and node.child_count == 1 and node.child(0).type == "string"


def _words_of(comment: str) -> str:
    """A comment without the signs that make it one."""
    if comment.lstrip("rRbBuUfF")[:1] in ("'", '"'):
        return comment.lstrip("rRbBuUfF").strip("'\"").strip()
    lines = (line.strip().lstrip("#/*!").removesuffix("*/").rstrip("*").strip() for line in comment.splitlines())
    return "\n".join(line for line in lines if line)
