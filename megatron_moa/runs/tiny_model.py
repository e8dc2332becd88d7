"""Holds the flags of two tiny models on mock data, dense and MoE, for tools and tests."""

# The data are the same for every run with the same seed. The vocabulary, 64 with the end-of-document token, is padded
# to a multiple of 16 times the tensor-parallel size: to 64 up to TP 4.
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
    "--lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --seed 7 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 16 --split 90,5,5 "
    "--log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0"
).split()
SWIGLU = "--swiglu --ffn-hidden-size 48".split()
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall"
).split()
