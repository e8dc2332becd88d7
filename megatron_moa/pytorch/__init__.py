"""Offers the mixture in any PyTorch model, without Megatron.

Here are a feed-forward module, and the means to turn trained layers into it.

Start with feed_forward.py; recognition.py says what a layer of somebody else's computes, and replacement.py swaps all
of a model's (docs/pytorch.md). Needs torch alone.
"""
