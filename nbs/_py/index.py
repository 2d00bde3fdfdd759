# %% [markdown]
# # sdpo_nb
# > Stepwise DPO as a book that computes.
