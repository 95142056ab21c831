"""From a name to the files of a model, and from files to its config, weights and profile."""
