"""Endpoints about texts: their tokens, and what the chat template makes of messages."""

import asyncio

from minillm.server import fields, messages, prompt
from minillm.server.errors import bad
from minillm.server.http import Json, json_body


class Texts:
    """Endpoints of a Server. As llama.cpp's server has them."""

    def __init__(self, server):
        self.server, self.llm = server, server.llm

    async def _body(self, request):
        return await json_body(request, self.server.settings.max_body)

    async def tokenize(self, request):
        """{"content", "add_special", "parse_special", "with_pieces"} -> {"tokens"}"""
        body = await self._body(request)
        text = fields.of_type(body, "content", str, "a text")
        if text is None:
            raise bad("content must be a text", "content")
        bos = fields.truth(body, "add_special")
        ids = await asyncio.to_thread(self._ids, text, bos, fields.truth(body, "parse_special", True))
        if not fields.truth(body, "with_pieces"):
            return Json({"tokens": ids})
        return Json({"tokens": [{"id": one, "piece": self._piece(one)} for one in ids]})

    def _ids(self, text, bos, special):
        if special:
            return prompt.encoded(self.llm, text, "content", bos=bos)
        return prompt.plain_ids(self.llm, text, "content", bos=bos)

    def _piece(self, token):
        """Its text, or its bytes where they are no UTF-8."""
        data = self.llm.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return list(data)

    async def detokenize(self, request):
        """{"tokens"} -> {"content"}, special tokens by their names"""
        body = await self._body(request)
        ids = fields.of_type(body, "tokens", list, "a list of token ids")
        n = self.llm.config.vocab_size
        if ids is None or not all(fields.is_id(one) and 0 <= one < n for one in ids):
            raise bad(f"tokens must be a list of token ids, whole numbers in 0..{n - 1}", "tokens")
        tokenizer = prompt.tokenizer(self.llm)
        data = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
        return Json({"content": tokenizer.without_leading_space(data)})

    async def apply_template(self, request):
        """{"messages", "add_generation_prompt"} -> {"prompt"}"""
        body = await self._body(request)
        talk = messages.checked(body, self.server.files.text)
        begins = fields.truth(body, "add_generation_prompt", True)
        return Json({"prompt": await asyncio.to_thread(prompt.shown, self.llm, talk, begins)})
