"""Evaluation: tasks (documents + score + reward in one object), the runner, and the scene detector that scores
pictures.

It does not depend on how anything is generated: a task sees prompts and outputs only. Run by `unigen eval TASK`.
"""
