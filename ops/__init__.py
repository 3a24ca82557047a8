"""Tuned forms of what the top modules define: same arguments, same results.

Read the definition first, then its tuned form: `simplified_hstu.gated_attention` and `attention`
(on CUDA `triton_attention`), `model.infonce_loss` and `infonce`, `dot_product_similarity` and
`ranking`. `collectives` and `sharded_table` are for several processes.
"""
