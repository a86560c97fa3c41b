"""How DSPy programs speak to a small model: plain chat messages, one output field.

Instructions and retrieved strategies stand in the system message, the other inputs in the user's;
what comes back is taken as it stands, and what cannot be read is counted, never asked again in
another format.
"""

import re

import dspy


class Lines(dspy.Adapter):
    """Renders a signature with one output field as plain chat messages.

    `failed` holds completions that could not be read as the type of the field; the field is then
    None, and nothing is asked again.
    """

    def __init__(self):
        super().__init__()
        self.failed: list[str] = []

    def format(self, signature, demos, inputs) -> list[dict]:
        """System: instructions, then strategies. Demos as earlier turns. User: the other inputs."""
        if len(signature.output_fields) != 1:
            raise ValueError(f"{signature.__name__} has several output fields; Lines reads one.")
        system = signature.instructions.strip()
        if strategies := inputs.get("strategies"):
            system += f"\n\n{strategies}"
        (output,) = signature.output_fields
        messages = [{"role": "system", "content": system}]
        for demo in demos:
            messages.append({"role": "user", "content": _user(signature, demo)})
            messages.append({"role": "assistant", "content": _said(demo[output])})
        return [*messages, {"role": "user", "content": _user(signature, inputs)}]

    def parse(self, signature, completion: str) -> dict:
        """The output field read as its type, None where that is impossible."""
        ((name, field),) = signature.output_fields.items()
        value = _read(completion, field.annotation)
        if value is None:
            self.failed.append(completion)
        return {name: value}


def _user(signature, inputs) -> str:
    """The inputs that stand in the user's message; one alone stands without its name."""
    given = {k: inputs[k] for k in signature.input_fields if k != "strategies" and k in inputs}
    if len(given) == 1:
        return str(*given.values())
    return "\n\n".join(f"{name.capitalize()}:\n{value}" for name, value in given.items())


def _said(value) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _read(completion: str, kind):
    text = completion.strip()
    if kind == (bool | None):
        found = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
        return found and found[1].lower() == "yes"
    if kind == (int | None):
        found = re.search(r"\d+", text)
        return found and int(found[0])
    return text or None
