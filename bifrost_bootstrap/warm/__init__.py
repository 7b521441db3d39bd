"""The step `warm`: the module cache made equal to the database, atomically."""
