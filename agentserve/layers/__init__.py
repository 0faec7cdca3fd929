"""The parts a decoder is made of. They know tensors and configuration, not requests, pages' owners or files."""
