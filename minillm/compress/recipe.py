"""Recipe: a CacheConfig bound to a model and its profile. Carries the parts of the method out, one layer at a time."""


class Recipe:
    """A score, an allocation and a merge with their options.

    config: CacheConfig, its method named. options: those of the parts by name, the threshold of a quality included."""

    def __init__(self, config, options):
        self.config, self.options = config, options

    def scores(self, layer):
        """(R,) float32, or None where nothing is scored."""
        return self.config.score and self.config.score(layer, options=self.options)

    def targets(self, ledger, layer, scores):
        """The entries of the layers seen so far, this one the last."""
        return self.config.allocation.layers(ledger, layer, scores, options=self.options)

    def plan(self, layer, scores, target):
        """The Plan of a layer. target: entries to make; None: the method decides."""
        return self.merged(layer, scores, self.into(layer, scores, target))

    def into(self, rows, scores, target):
        """Which row each becomes part of: an Into. rows: a Layer, or Rows of several layers for one cut."""
        return self.config.allocation.heads(rows, scores, target, options=self.options)

    def merged(self, layer, scores, into):
        """The Plan of rows of which that is known."""
        plan = self.config.merge(layer, scores, into.rows, options=self.options)
        if plan.threshold is None:
            plan.threshold = into.threshold
        return plan
