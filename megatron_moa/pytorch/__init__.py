"""The mixture in any PyTorch model, without Megatron: a feed-forward module, and trained layers turned into it.

Start with feed_forward.py; recognition.py says what a layer of somebody else's computes, and replacement.py swaps all
of a model's (docs/pytorch.md). Needs torch alone.
"""
