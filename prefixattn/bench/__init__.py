"""`prefixattn bench`: the operation measured against everything else that could be called."""
