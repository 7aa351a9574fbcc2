"""Offline merging, ``weft merge``: the engine of a round, on adapters and checkpoints that anyone made.

What a person asks for (``recipe``, or a file of mergekit's: ``mergekit``) and what the directories hold
(``inputs``) become a list of **units** (``checkpoints``, ``adapters``): one tensor of a checkpoint, one layer
of an adapter. Everything that can be refused is refused while that list is made. Units are merged one after
the other, each on all threads, straight into the files of a ``.partial`` directory (``output``), which takes
its place in one rename when the last is done (``merging``).

Tensors are mapped and read in tiles, so memory does not grow with the number of inputs or the size of the
model. Arithmetic is float32 whatever is stored.
"""
