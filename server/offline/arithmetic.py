"""Arithmetic on movements, ``2*math - toxic + 0.5*(german + french)/2``: text becomes a coefficient for each input.

The operators are those of PEM arithmetic (arXiv 2306.14870): addition, negation, multiplication by a number. What
they are applied to is a movement: of whole models trained − base, of adapters ΔW = B A, so that a minus turns ΔW
round and not both of its factors.

Python's own grammar is read, by ``ast``, and of its nodes only those below are understood; nothing is evaluated.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from weft.common.errors import UsageError

_LENGTH_MAX: Final = 4000
"""Characters; what is longer belongs into a recipe."""
_EXAMPLE: Final = 'write sums of inputs, for example "2*math - toxic + 0.5*german"'


@dataclass(frozen=True, slots=True)
class _Sum:
    """A number, or a sum of inputs times numbers."""

    number: float
    """What belongs to no input."""
    coefficients: Mapping[str, float]
    """By input, in the order that they appear in."""

    def times(self, factor: float) -> _Sum:
        return _Sum(self.number * factor, {name: each * factor for name, each in self.coefficients.items()})

    def plus(self, other: _Sum) -> _Sum:
        total = dict(self.coefficients)
        for name, each in other.coefficients.items():
            total[name] = total.get(name, 0.0) + each
        return _Sum(self.number + other.number, total)


def parse_expression(text: str) -> dict[str, float]:
    """Read an expression into coefficients by input.

    Inputs are names, with dots if they have some; other names stand in quotes. There are numbers, ``+``, ``-``,
    ``*`` and parentheses, and ``/`` with a number on its right. An input that is there twice counts for the sum.

    Raises:
        UsageError: It is something else; names the column, counted from 1.
    """
    tree = _parse(text)
    try:
        found = _Reader(text).read(tree)
    except RecursionError as error:
        raise UsageError("the expression is nested too deeply", hint=_EXAMPLE) from error
    if found.number:
        raise UsageError(
            f"the expression adds the number {found.number:g}, which is no input",
            hint=f'numbers multiply inputs: write for example "{found.number:g}*math"',
        )
    if not found.coefficients:
        raise UsageError("the expression names no input", hint=_EXAMPLE)
    if not any(found.coefficients.values()):
        raise UsageError("all inputs cancel out of the expression", hint="leave one of them in")
    for name, each in found.coefficients.items():
        if not math.isfinite(each):
            raise UsageError(f"the coefficient of {name} is {each}", hint="use smaller numbers")
    return dict(found.coefficients)


def _parse(text: str) -> ast.expr:
    if len(text) > _LENGTH_MAX:
        raise UsageError(
            f"the expression has {len(text)} characters",
            hint=f"keep within {_LENGTH_MAX}, or merge in two steps",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        indent = len(text) - len(text.lstrip())
        raise _refusal(text, indent + (error.offset or 1), "cannot be read from here on") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError("the expression cannot be read", hint=_EXAMPLE) from error


def _refusal(text: str, column: int, said: str, hint: str = _EXAMPLE) -> UsageError:
    return UsageError(f'expression, column {column}: "{text[column - 1 :][:20]}" {said}', hint=hint)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns nodes into sums."""

    text: str

    def read(self, node: ast.expr) -> _Sum:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return _Sum(float(number), {})
            case ast.Constant(value=str() as name) if name:
                return _Sum(0.0, {name: 1.0})
            case ast.Name() | ast.Attribute():
                return _Sum(0.0, {self._name(node): 1.0})
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.read(operand).times(-1.0)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.read(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, self.read(left), op, self.read(right))
        raise self._refuse(node, "is no number, no input and no sum")

    def _binary(self, node: ast.BinOp, left: _Sum, op: ast.operator, right: _Sum) -> _Sum:
        match op:
            case ast.Add():
                return left.plus(right)
            case ast.Sub():
                return left.plus(right.times(-1.0))
            case ast.Mult() if not left.coefficients:
                return right.times(left.number)
            case ast.Mult() if not right.coefficients:
                return left.times(right.number)
            case ast.Mult():
                raise self._refuse(node.right, "is an input, and so is what it is multiplied by")
            case ast.Div() if right.coefficients:
                raise self._refuse(node.right, "is an input: only numbers divide")
            case ast.Div() if right.number == 0:
                raise self._refuse(node.right, "is 0, and divides")
            case ast.Div():
                return left.times(1 / right.number)
        raise self._refuse(node.right, "stands behind an operator that is not + - * or /")

    def _name(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                return name
            case ast.Attribute(value=value, attr=name):
                return f"{self._name(value)}.{name}"
        raise self._refuse(node, "is no name", "put names with other signs in quotes: \"'my-model' - toxic\"")

    def _refuse(self, node: ast.expr, said: str, hint: str = _EXAMPLE) -> UsageError:
        stripped = self.text.strip()
        line = stripped.splitlines(keepends=True)[: node.lineno]
        before = "".join(line[:-1]) + line[-1].encode()[: node.col_offset].decode()
        indent = len(self.text) - len(self.text.lstrip())
        return _refusal(self.text, indent + len(before) + 1, said, hint)
