"""The rendered world that the shipped model learns from: scenes, captions, questions, stories, chats."""
