"""The tool behind <|python_start|>: arithmetic and counting letters, by walking a syntax tree, never by eval.

Allowed: numbers, + − * / // and unary minus, parentheses, and "text".count("x"). Everything else, and anything large,
gets no answer.
"""

import ast
import operator
import warnings
from collections.abc import Callable

MAX_CHARACTERS = 200
MAX_NODES = 50
MAX_MAGNITUDE = 10**15
warnings.filterwarnings("ignore", module="<expression>")  # what Python thinks of "12if"

Number = int | float
OPERATORS: dict[type, Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def calculate(expression: str) -> str | None:
    """The value of an expression as text, or None when it is not allowed, too large, or has none.

    Commas in numbers are dropped ("1,000" is 1000); a whole quotient is written as an integer.
    """
    expression = expression.strip()
    if "count" not in expression:
        expression = expression.replace(",", "")
    if not expression or len(expression) > MAX_CHARACTERS:
        return None
    try:
        tree = ast.parse(expression, "<expression>", "eval")
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            return None
        value = _value(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(round(value, 10))
    return str(value)


def _value(node: ast.AST) -> Number:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value: Number = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise ValueError("not allowed")
    if abs(value) > MAX_MAGNITUDE:  # also NaN-free: inf is larger
        raise OverflowError("too large")
    return value
