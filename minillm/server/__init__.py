"""A server: many people ask one model over the API that OpenAI's clients speak. Needs the extra `server`."""
