"""python -m minillm.evaluate: the papers' tasks, tables and pictures for any model, method and budget."""
