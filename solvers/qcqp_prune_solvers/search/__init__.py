"""Parts of the block coordinate search: the state, the blocks, and the moves between blocks."""
