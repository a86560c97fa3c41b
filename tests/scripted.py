"""An engine for DSPy that says what a test wants said."""

from collections.abc import Callable, Sequence

from dspy.lm15 import Message, Request, Response, TextPart, Usage


class Scripted:
    """Says `replies` in turn, or what they give for the messages; `asked` holds the messages of
    each call as (role, text)."""

    name = "kit/scripted"

    def __init__(self, replies: Sequence[str] | Callable[[list], str]):
        self.replies, self.asked = replies, []

    def complete(self, request: Request) -> Response:
        system = request.system
        if not isinstance(system, str):
            system = "".join(part.text for part in system or ())
        self.asked.append([("system", system), *((m.role, m.text) for m in request.messages)])
        call = callable(self.replies)
        text = self.replies(self.asked[-1]) if call else self.replies[len(self.asked) - 1]
        said = Message.assistant([TextPart(text)])
        return Response(
            id=None, model=request.model, message=said, finish_reason="stop", usage=Usage()
        )

    def close(self) -> None:
        pass
