"""What a parameter's name says about its dims: which are the rows of a matrix, which its columns.

Capital letters at the end of a name are the parameter's dims in the project's alphabet; dims of the array in front of
them, such as the L of stacked layers, count matrices rather than belong to one. Heads and their width are one side of a
matrix, as in the products that use them: `query_DHK` has D rows and HK columns, `out_HKD` HK rows and D columns. Of a
name without letters, such as the `kernel` of nnx.Linear, the last two dims are the matrix. Anything called a scale or a
bias is a vector, whatever its dims.
"""

from typing import Any

import jax

Path = tuple[Any, ...]


def rows_and_columns(path: Path, x: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dims of parameter `x` at a tree path that count rows and columns, from the end (-1 is the last).

    A vector has no rows. Dims in neither stack matrices or vectors.
    """
    words = _name(path).split("_")
    letters = _letters(words, x)
    if {"scale", "bias"} & set(words):
        return (), _last(len(letters) or min(x.ndim, 1))
    letters = letters or "?" * min(x.ndim, 2)
    columns = _side(letters)
    rows = _side(letters[:-columns]) if columns else 0
    return tuple(d - columns for d in _last(rows)), _last(columns)


def sides(path: Path, x: jax.Array) -> tuple[str, str]:
    """The letters of the rows and of the columns: "D" and "HK" of `query_DHK`, none and "F" of `up_bias_F`.

    A name without letters has none.
    """
    letters = _letters(_name(path).split("_"), x)
    rows, columns = rows_and_columns(path, x) if letters else ((), ())
    return "".join(letters[d] for d in rows), "".join(letters[d] for d in columns)


def matrices(tree: Any) -> Any:
    """Which parameters of a model are matrices, as a tree of booleans: those that weight decay is for."""
    return jax.tree_util.tree_map_with_path(lambda path, x: bool(rows_and_columns(path, x)[0]), tree)


def hidden(tree: Any) -> Any:
    """Which parameters are matrices between two hidden layers, as a tree of booleans: not embeddings, not the head.

    Those have tokens (V) or positions (P) on one side, which a name without letters does not say: of such names, what
    is called an embedding or a head is none, and any other matrix is one.
    """

    def inner(path: Path, x: jax.Array) -> bool:
        words = _name(path).split("_")
        ends = {"embed", "embedding", "head"} & set(words) or {"V", "P"} & set(_letters(words, x))
        return bool(rows_and_columns(path, x)[0]) and not ends

    return jax.tree_util.tree_map_with_path(inner, tree)


def _letters(words: list[str], x: jax.Array) -> str:
    return words[-1] if len(words) > 1 and words[-1].isupper() and len(words[-1]) <= x.ndim else ""


def _name(path: Path) -> str:
    """The attribute that holds a parameter: "query_DHK" of `.blocks.query_DHK.value`."""
    words = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    return words.rpartition(".")[2]


def _side(letters: str) -> int:
    """How many of the last letters are one side of a matrix: K, N and Y, the widths of heads, go with the heads."""
    return min(len(letters), 2 if letters.endswith(("K", "N", "Y")) else 1)


def _last(count: int) -> tuple[int, ...]:
    return tuple(range(-count, 0))
