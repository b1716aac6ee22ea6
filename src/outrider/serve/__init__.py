"""The server: OpenAI's HTTP interface over one engine. Needs the extra `serve`; nothing else imports a web framework."""
