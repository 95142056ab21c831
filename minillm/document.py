"""Document: a text that is compressed once, and asked many times."""

from minillm.sampling import SamplingParams


class Document:
    """A text that was read and compressed once and is asked many times. A context manager."""

    def __init__(self, session):
        self.session = session  # settled; it is never asked itself

    def ask(self, question, params=None, progress=None):
        """Yields the Pieces of the answer to a question about the text. The next question knows nothing of this one."""
        session = self.fork()
        try:
            if session.open:
                yield from session.ask(question, params or SamplingParams(), progress=progress)
            else:
                session.feed(question)
                yield from session.stream(params or SamplingParams(), progress)
        finally:
            session.close()

    def fork(self):
        """A Session that goes on after the text: its first question is about it, later ones follow up."""
        return self.session.fork()

    def save(self, path):
        """Write it to a session file, which `LLM.document` takes up. Raises MinillmError."""
        self.session.save(path)

    def close(self):
        """Give the memory back; forks keep what they hold."""
        self.session.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def after_document(message, text):
    """The user's message that a document and a question make."""
    return message | {"content": f"{message['content']}\n\n{text}" if message["content"] else text}
