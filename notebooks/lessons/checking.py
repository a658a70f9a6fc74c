"""What every check does: call the student's function, compare, and say what is wrong in one sentence."""

from __future__ import annotations

import ast
import inspect
import linecache
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch


class Hint(AssertionError):
    """What a check says when an exercise is not solved yet; Jupyter shows it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]


CHECKS: dict[str, tuple[Callable[..., None], str]] = {}  # exercise -> its check, and how to begin
BLANK = "raise NotImplementedError()"
STUMBLES = {  # part of an error's message -> what it means to a student
    r"bitwise_(and|or)|for [&|]": "& and | bind tighter than > and ==: put each comparison in brackets.",
    "ambiguous": "`if`, `and`, `or` and `max` want one truth value, this has many: use &, |, clamp or np.where.",
    r"builtin_function_or_method|'method'|bound method": "Are the brackets of a call missing?",
    r"^(max|min)(imum)?\(\)(:| received)": "max and maximum of PyTorch take no plain number: x.clamp(min=0) does.",
    r"must be Tensor": "PyTorch wants tensors; torch.from_numpy(...) makes one of an array.",
    r"object is not callable": (
        "Is a * missing before a bracket, as in 2 * (a - b)? Or did PyTorch get an array (torch.from_numpy)?"
    ),
    r"read-only": "Work on a copy: `.copy()`.",
    r"broadcast|must match the size|sequence argument|same length|inconsistent numbers": "The shapes do not match.",
    r"scalar index|list indices": "A list cannot be indexed by an array: np.asarray(...) makes one.",
    r"not subscriptable|item assignment": "That is one number, not an array: is a size given in brackets?",
    r"continuous": "Labels come first, then scores.",
    r"Expected 2D": "Voxels come first, then labels.",
    r"should be a 1d array": "One score for each voxel is wanted; predict_proba has two columns.",
    r"with size 0|zero-size|empty": "Nothing is selected: no value is exactly that.",
    r"too many indices": "It has fewer axes than that: [None] in front makes one image a batch of one.",
    r"out of bounds|out of range": "An index is too large for the axis that it counts along.",
    r"'numpy.ndarray' and 'Tensor'|'Tensor' and 'numpy": "An array and a tensor do not mix: .numpy() makes arrays.",
    r"arrays used as indices": "Only whole numbers and truth values can index an array.",
    r"\.view|view size": "`reshape` or `flatten` copies where `view` cannot.",
    r"subtract|negative, the `-`|Negation|negative operator": "~ is the opposite of a truth value; & ~ takes away.",
    r"Got: Bool|for 'Bool'": "Truth values need `.float()` before a mean or a pooling.",
    r"is not defined": "That name does not exist here: is it misspelt, or its import missing?",
    r"referenced before|not associated": "That name is used before it has a value.",
    r"missing \d+ required|takes .*positional|unexpected keyword": "Compare the arguments of the call.",
    r"ndarray' object has no attribute '(append|index|reverse)'": "Lists do that, arrays do not: list(x) makes one.",
    r"'numpy.ndarray' object has no attribute": "Arrays have fewer methods than tensors: np.log(p), np.abs(d), d**2.",
    r"'Tensor' object has no attribute": "Tensors have other methods than arrays: .float(), .clone(), .numpy().",
    r"'VoxelTuples' object has no attribute": "The fields of tuples are anchors, positives and negatives.",
    r"not fitted": "Fit the probe before you ask it: .fit(x_fit, y_fit).",
    r"does not require grad": "Nothing here asks PyTorch for gradients. Write the derivative by hand.",
    r"cannot unpack": "Several names wait for one value: `shape` gives all sizes, `len` the first alone.",
    r"diag requires": "np.cov makes a number of one channel, not a matrix. `var` takes one channel or many.",
}


def exercise(name: str, begin: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the check of an exercise; its parameter is named as the student's function is."""

    def register(check_function: Callable[..., None]) -> Callable[..., None]:
        CHECKS[name] = check_function, begin
        return check_function

    return register


def check(name: str, names: Mapping[str, Any]) -> None:
    """Say that an exercise is passed, or stop with a hint.

    Args:
        name: of the exercise, as "4.1".
        names: the notebook's names, `globals()`.
    """
    look, begin = CHECKS[name]
    (wanted,) = inspect.signature(look).parameters
    if wanted not in names:
        raise Hint(f"Exercise {name}: there is no `{wanted}` here. Run the cell that defines it, under this name.")
    try:
        with np.errstate(all="ignore"):
            look(names[wanted])
    except Hint as hint:
        raise Hint(f"Exercise {name}: {hint}") from None
    except Exception as error:  # noqa: BLE001  whatever a student's code raises becomes a hint
        raise Hint(f"Exercise {name}{_explained(error, begin)}") from None
    print(f"✓ Exercise {name} is passed.")


def expect(true: object, hint: str) -> None:
    """Stop with the hint unless this is true."""
    if not true:
        raise Hint(hint)


def ask(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the student's function answers; stops if it answers nothing or changes what it was given."""
    given = deepcopy(arguments)
    answer = function(*given, **options)
    for name, before, after in zip(inspect.signature(function).parameters, arguments, given, strict=False):
        if isinstance(before, (np.ndarray, torch.Tensor, list)):
            expect(
                _equal(_array(before), _array(after), 0), f"your function changes its argument `{name}`. Use a copy."
            )
    expect(answer is not None, "your code gives back None. Is a `return` missing?")
    return answer


def same(
    answer: object, right: object, mistakes: Mapping[str, object], otherwise: str, tolerance: float = 1e-4
) -> None:
    """Stop unless the answer is right: with the hint of the mistake that gives the same answer, or `otherwise`.

    Args:
        mistakes: hint -> what comes out if one makes that mistake.
        tolerance: relative, for answers that may be right in more than one way.
    """
    right = _array(right)
    try:
        given, answer = answer, _array(answer)
    except (TypeError, ValueError):
        wanted = f"an array {right.shape}" if right.ndim else "a number"
        raise Hint(f"your code gives back {described(answer)}, but {wanted} is wanted. {otherwise}") from None
    if _equal(answer, right, tolerance):
        alone = f"the number is right, but it stands in {described(given)}. Give it back by itself."
        expect(right.ndim or np.ndim(given) == 0, alone)
        return
    for exactness in (min(tolerance, 1e-4), tolerance):
        for hint, wrong in mistakes.items():
            expect(not _equal(answer, _array(wrong), exactness), hint)
    raise Hint(f"{_difference(answer, right, tolerance)} {otherwise}")


def _difference(answer: np.ndarray, right: np.ndarray, tolerance: float) -> str:
    """In which way the answer is wrong, if no mistake that the check knows gives it."""
    if answer.shape != right.shape:
        for name, reduced in {"mean": np.mean, "sum": np.sum}.items():
            if answer.ndim > right.ndim == 0 and _equal(reduced(answer), right, tolerance):
                return f"you give back {answer.size} numbers; their {name} is the answer."
        if _equal(answer.T, right, tolerance):
            return "your axes are in the wrong order."
        return f"the shape is {answer.shape}, but {right.shape} is wanted."
    if np.isnan(answer).any() and not np.isnan(right).any():
        return (
            "there is NaN (not a number) in your answer: a 0 / 0, or the logarithm or root of what is not positive?"
        )
    if _equal(-answer, right, tolerance):
        return "the sign is the wrong way round."
    if right.ndim and set(np.unique(right)) <= {0, 1}:
        extra, missing = ((answer != 0) & (right == 0)).sum(), ((answer == 0) & (right == 1)).sum()
        return f"of {right.size} voxels {extra} are wrongly in your mask and {missing} are missing."
    with np.errstate(all="ignore"):
        ratio = np.unique(np.round(answer[right != 0] / right[right != 0], 4)) if right.ndim else answer / right
    if right.ndim and ratio.size == 1 and np.isfinite(ratio[0]) and ratio[0] and not answer[right == 0].any():
        return f"all your numbers are {ratio[0]:.4g} times ours."
    if right.size > 4:
        return "some of your numbers are wrong."
    yours, ours = (", ".join(f"{number:.4g}" for number in np.ravel(numbers)) for numbers in (answer, right))
    return f"you get {yours}, we get {ours}."


def _array(values: object) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach()
    if isinstance(values, (str, dict, set)):
        raise TypeError(values)
    return np.squeeze(np.asarray(values, dtype=float))


def _equal(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=tolerance, atol=1e-6, equal_nan=True)


def described(value: object) -> str:
    """`a tensor (40, 4) of float32`, for instance."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        kind = "a tensor" if isinstance(value, torch.Tensor) else "an array"
        return f"{kind} {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (int, float)):
        return f"{value:.4g}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def _explained(error: Exception, begin: str) -> str:
    """An error in the student's code: its line, what it says, and the shapes that meet there."""
    said = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(" .:")
    meaning = next((text for part, text in STUMBLES.items() if re.search(part, str(error), re.IGNORECASE)), begin)
    spot = _in_notebook(error.__traceback__)
    if spot is None:
        return f": what your code gives back cannot be checked ({said}). {meaning}"
    frame, number = spot
    if (used := _unwritten(error.__traceback__)) and used != frame.f_code.co_name:
        return f": `{used}`, which this exercise uses, is not written yet, or still holds the line `{BLANK}`."
    line = linecache.getline(frame.f_code.co_filename, number).strip()
    if line.startswith(BLANK):
        alone = _is_blank(linecache.getlines(frame.f_code.co_filename), number)
        return (
            f" is not written yet. {begin}" if alone else f": delete the line `{BLANK}`; your code stands beside it."
        )
    names = dict.fromkeys(re.findall(r"\b[A-Za-z_]\w*\b(?!\()", re.sub(r"(['\"]).*?\1|\.\w+", "", line)))
    seen = {name: frame.f_locals[name] for name in names if name in frame.f_locals}
    kinds = (np.ndarray, torch.Tensor, int, float, tuple, list)
    shapes = [f"{name} is {described(value)}" for name, value in seen.items() if isinstance(value, kinds)]
    there = [f"There {', '.join(shapes)}."] if shapes else []
    return "\n  ".join([f": line {number} stops:", f"  {line}", f"{said}.", *there, meaning])


def _in_notebook(trace: TracebackType | None) -> tuple[FrameType, int] | None:
    """The last frame in the cell that the check has called, with its line, if the error came from there."""
    spots = []
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "__main__":
            spots.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return next((s for s in reversed(spots) if s[0].f_code.co_filename == spots[0][0].f_code.co_filename), None)


def _unwritten(trace: TracebackType | None) -> str | None:
    """The function whose blank has stopped the code, if one has."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__") != "__main__":
        return None
    code = trace.tb_frame.f_code
    line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
    return code.co_name if line.startswith(BLANK) else None


def _is_blank(cell: list[str], number: int) -> bool:
    """Whether the function with this line of a cell holds nothing else (but a text that describes it)."""
    functions = [node for node in ast.walk(ast.parse("".join(cell))) if isinstance(node, ast.FunctionDef)]
    body = next(f.body for f in reversed(functions) if f.lineno <= number <= (f.end_lineno or 0))
    text = [part for part in body if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)]
    return len(body) - len(text) == 1
