"""Progress of long work: one line redrawn in its place in a notebook, lines in a log."""

from collections.abc import Callable
from itertools import chain, repeat


def in_place() -> Callable[[str], None]:
    """A function that takes lines of progress: in a notebook each takes the place of the one
    before, elsewhere they are printed."""
    from IPython import get_ipython
    from IPython.display import DisplayHandle

    if get_ipython() is None:
        return print
    handle = DisplayHandle()
    ways = chain([handle.display], repeat(handle.update))
    return lambda line: next(ways)({"text/plain": line}, raw=True)
