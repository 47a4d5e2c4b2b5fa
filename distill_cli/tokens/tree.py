"""The student's tokens that a teacher writes as several of its own: paths in a tree whose edges are the teacher's.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from distill_cli.tokens.byte_vocabulary import NO_TOKEN

Ints = NDArray[numpy.int64]
Bools = NDArray[numpy.bool_]


@dataclass(frozen=True)
class Tree:
    """Nodes are sequences of the teacher's tokens; the first ones, by id, are single tokens."""

    teacher_ids: int
    keys: Ints
    """By edge, rising: the node times `teacher_ids`, plus the token that leads on."""
    children: Ints
    """By edge, the node that it leads to."""
    tokens: Ints
    """By node, the student's token, or NO_TOKEN."""
    is_inner: Bools
    """By node, whether edges lead on."""
    below: Ints
    """The student's tokens that are paths of several edges, in such an order that those below a node are neighbours."""
    bounds: Ints
    """By node, the first of `below` that is at it or below it, and the one after the last: [nodes, 2]."""
    roots: Ints
    """By token of `below`, the first of the teacher's."""

    @classmethod
    def of(cls, paths: Mapping[tuple[int, ...], int], first: Ints) -> Tree:
        """Build the tree.

        Args:
            paths: the student's tokens by the teacher's, two or more.
            first: by the teacher's token the student's, or NO_TOKEN.
        """
        tokens, bounds = first.tolist(), [[0, 0]] * len(first)
        nodes, edges = dict[tuple[int, ...], int](), dict[int, int]()
        in_order = sorted(paths)
        for place, path in enumerate(in_order):
            node = path[0]
            if bounds[node][1] == 0:
                bounds[node] = [place, place]
            bounds[node][1] = place + 1
            for depth in range(2, len(path) + 1):
                key = node * len(first) + path[depth - 1]
                if path[:depth] not in nodes:
                    nodes[path[:depth]] = edges[key] = len(tokens)
                    tokens.append(NO_TOKEN)
                    bounds.append([place, place])
                node = nodes[path[:depth]]
                bounds[node][1] = place + 1
            tokens[node] = paths[path]
        keys: Ints = numpy.array(sorted(edges), dtype=numpy.int64)
        is_inner: Bools = numpy.zeros(len(tokens), dtype=bool)
        is_inner[keys // len(first)] = True
        return cls(
            len(first),
            keys,
            numpy.array([edges[key] for key in keys.tolist()], dtype=numpy.int64),
            numpy.array(tokens, dtype=numpy.int64),
            is_inner,
            numpy.array([paths[path] for path in in_order], dtype=numpy.int64),
            numpy.array(bounds, dtype=numpy.int64).reshape(-1, 2),
            numpy.array([path[0] for path in in_order], dtype=numpy.int64),
        )

    def child(self, nodes: Ints, tokens: Ints) -> Ints:
        """Return the nodes to which the teacher's tokens lead; NO_TOKEN where they leave the tree."""
        if not len(self.keys):
            return numpy.full(numpy.broadcast_shapes(nodes.shape, tokens.shape), NO_TOKEN)
        keys = nodes * self.teacher_ids + tokens
        place = numpy.minimum(numpy.searchsorted(self.keys, keys), len(self.keys) - 1)
        return numpy.where(self.keys[place] == keys, self.children[place], NO_TOKEN)

    def edges(self, nodes: Ints) -> tuple[Ints, Ints, Ints]:
        """Return all edges from nodes: the index of the node, the teacher's token, and the node that it leads to."""
        bounds = (nodes * self.teacher_ids, (nodes + 1) * self.teacher_ids)
        which, at = spread(*(numpy.searchsorted(self.keys, one) for one in bounds))
        return which, self.keys[at] % self.teacher_ids, self.children[at]

    def at_or_below(self, nodes: Ints) -> tuple[Ints, Ints]:
        """Return all of the student's tokens at nodes or below them, after the index of the node; single tokens of the
        teacher have none of their own here."""
        which, at = spread(*self.bounds[nodes].T)
        return which, self.below[at]

    def token_of(self, nodes: Ints) -> Ints:
        """Return the student's tokens of nodes, NO_TOKEN where there is none."""
        return numpy.where(nodes >= 0, self.tokens[nodes], NO_TOKEN)


def spread(begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Return all numbers of several ranges, after the index of the range of each."""
    counts = end - begin
    which = numpy.repeat(numpy.arange(len(counts)), counts)
    return which, begin[which] + numpy.arange(len(which)) - numpy.repeat(numpy.cumsum(counts) - counts, counts)


def groups_of(tree: Tree) -> tuple[Ints, Ints, Ints]:
    """Return which of the student's tokens begin with the same token of the teacher, as far as several do.

    Returns:
        The tokens, and the index of each one's group, [M] each; and the token that stands for each group, [G].
    """
    reps, groups = numpy.unique(tree.tokens[tree.roots], return_inverse=True)
    return numpy.concatenate([reps, tree.below]), numpy.concatenate([numpy.arange(len(reps)), groups]), reps
