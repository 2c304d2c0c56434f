"""Models behind the OpenAI API: `unigen serve`."""
