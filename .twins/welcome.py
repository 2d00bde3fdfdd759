# %% [markdown]
# # Start here
# > What alignment is for, what each symbol means, and three ways through the book.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/welcome.ipynb)
#
# **You should know** what a language model is: a network that gives every possible next token a probability. **Time** 15 minutes to read, a second to run.
#
# ## What is alignment for?
#
# A language model is made in three steps.
#
# 1. **Pretraining.** It reads a large part of the internet and learns to continue text. Asked a question, it may well continue with more questions.
# 2. **Supervised fine-tuning, SFT.** It is shown good answers, and learns to imitate them. We call the model that comes out **S**. It answers now. But imitation does not tell it which of its own answers people would rather have.
# 3. **Alignment.** People compare answers, and the model learns from what they prefer. This book is about the third step.
#
# Why comparisons? Because they are what people are good at. It is hard to write the best answer, and nobody can say whether an answer deserves 6.1 or 6.4. But shown two answers, most people can say which one is better. So the data of
# alignment are *preference pairs*: a prompt $x$, a **chosen** response $y_w$ (the winner) and a **rejected** response $y_l$ (the loser).
#
# ## From pairs to a better model
#
# There are two ways.
#
# **RLHF**, reinforcement learning from human feedback, takes two steps. First it trains a *reward model* on the pairs: a second network that gives each response a number, its reward, such that chosen responses get more than rejected ones. Then the language model writes responses, the reward model scores
# them, and reinforcement learning (usually an algorithm called PPO) makes responses with a high score more likely. A leash keeps the model close to S, because far from S the reward model has seen nothing and its scores mean nothing.
#
# **DPO**, direct preference optimization, needs one step and no second network. It trains the language model on the pairs directly. Its loss has the same optimum as RLHF, if the labels follow the reward, there are enough of them, and the model is free to express that optimum:
#
# $$-\log \sigma\Big(\beta \big[\underbrace{\log\pi(y_w|x) - \log\pi(y_l|x)}_{\gamma\text{ of the policy}} - \underbrace{(\log\pi_{ref}(y_w|x) - \log\pi_{ref}(y_l|x))}_{\gamma\text{ of the reference}}\big]\Big)$$
#
# In words: the **policy** $\pi$, the model that we train, should prefer the chosen response *more than the **reference** $\pi_{ref}$ does*. The reference is a frozen model, usually S. It is the zero from which gain is counted. So it is a bar: what counts is how far the policy is above it. And it is a leash: once a pair has gained enough, that pair stops pulling. Without a reference, nothing of S would
# enter the loss, and all that S learned besides these pairs would have no weight. $\beta$ says how soon a pair is satisfied: the larger $\beta$, the fewer nats (units of the natural logarithm) of gain it takes, and the nearer the policy stays to its reference. [Chapter 03](03_loss.ipynb) derives this loss, line by line, and checks every line.
#
# ## Stepwise
#
# **Stepwise DPO**, sDPO ([Kim et al.](https://arxiv.org/abs/2403.19270)), asks: must the reference be S until the end? It cuts the pairs into chunks, easy ones first (those where S already finds the chosen response likelier), and trains in **stages**, one per chunk. After each stage, the model that came out becomes the new reference.

# %%
#| echo: false
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(9.5, 4))
ax.set(xlim=(-1, 13), ylim=(-3.9, 4.1))
ax.axis("off")
centred = dict(ha="center", va="center")

def box(x, y, text, color):
    "Words in a coloured box."
    frame = dict(boxstyle="round,pad=0.5", fc=color, ec="black", lw=0.8)
    ax.text(x, y, text, fontsize=11, bbox=frame, **centred)

def arrow(x1, y1, x2, y2, text=""):
    "An arrow with a word on its middle."
    look = dict(arrowstyle="-|>", lw=1.2)
    ax.annotate("", xy=(x2, y2), xytext=(x1, y1), arrowprops=look)
    behind = dict(fc="white", ec="none", pad=1.5)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    ax.text(x, y, text, fontsize=10, bbox=behind, **centred)

box(0, 0, "$M_0 = S$", "lightsteelblue")
for t in (1, 2, 3):
    left = 4 * t - 4
    middle, right = left + 2, left + 4
    table = f"reference table:\nwhat $M_{t-1}$ says\nabout $D_{t}$"
    ax.text(middle, 3.6, f"stage {t}", fontsize=12, weight="bold", **centred)
    box(middle, 2.6, f"chunk $D_{t}$", "moccasin")
    box(middle, -2.6, table, "honeydew")
    box(right, 0, f"$M_{t}$", "lightsteelblue")
    arrow(middle, 2.1, middle, 0.3)
    arrow(middle, -1.5, middle, -0.3)
    arrow(left + 0.6, 0, right - 0.5, 0, "train")
    arrow(left, -0.5, left + 0.7, -2.2, "writes")

# %% [markdown]
# One run, from left to right. Before stage $t$, the model of the stage before reads the chunk $D_t$, and what it says about each pair is written into a table. Then it is trained on that chunk against its own table. The first loss of every stage is therefore the same: the policy *is* its reference, its
# gain over it is zero, and the loss is $-\log\sigma(0) = \ln 2 = 0.693$.
#
# Why would one want this? The authors' reason: a reference that is already aligned is a higher bar to clear than S. Is it better, then? The paper reports so. This book asks again, in a [tiny world](00_world.ipynb) where the true reward of every response is known, with controls that the paper does not have, and finds: tuned alike,
# stepwise DPO and plain DPO end [equally good](experiments/protocol.ipynb). It is worth understanding all the same. People align their models in stages, with new data each time, and must then choose *where a stage starts* and *which model is its reference*. In our worlds the start matters much, and the reference little.
#
# ## The symbols
#
# | symbol | name | meaning |
# |---|---|---|
# | $x$ | prompt | what the user asks |
# | $y_w$, $y_l$ | chosen, rejected | the response that people preferred, and the other one |
# | $\pi(y\vert x)$ | policy | probability of a response under the model that we train; a product over its tokens |
# | $\pi_{ref}$ | reference | the frozen model that the policy is compared with |
# | S | SFT model | where everything begins; $M_0 = S$ |
# | $M_t$ | | the model after stage $t$ |
# | $D_t$ | chunk | the pairs that stage $t$ trains on |
# | $T$ | | number of stages |
# | $\gamma$ | gamma | $\log\pi(y_w\vert x) - \log\pi(y_l\vert x)$: how much likelier the chosen response is than the rejected one, in nats (natural units: 0.69 nats is a factor of two) |
# | $\beta$ | | how soon a pair is satisfied: the larger $\beta$, the fewer nats of gain it takes, and the nearer the policy stays to its reference |
# | $\sigma$ | sigmoid | $1/(1+e^{-z})$: turns any number into a probability |
# | $r$ | true reward | how good a response really is; known in the tiny world only |
# | $k$ | | how clearly people see the difference: in the tiny world the better response wins with probability $\sigma(k \times$ difference of $r)$ |
# | | implicit reward | $\beta\,(\log\pi(y\vert x) - \log\pi_{ref}(y\vert x))$: what DPO takes a response to be worth |
# | KL | Kullback-Leibler divergence | how far a model has moved from another, in nats: the mean of $\log\pi(y\vert x) - \log\pi_{ref}(y\vert x)$ over responses that the first one writes |
#
# ## Three ways through the book
#
# Each chapter is a notebook: an idea, a few lines of code, a value to look at, a check that keeps it true. Every chapter says at its head how long it takes.
#
# **To understand DPO and its stages, about five hours.**
#
# 1. [00](00_world.ipynb): "Four skills", "The true reward", then from "The world of this book" to "A world one can list". The world in which we can see the truth. 55 minutes.
# 2. [01](01_preferences.ipynb), part one: where the prompt ends and the response begins. 40 minutes.
# 3. [02](02_logprobs.ipynb), part 1: what a model says about a response. 30 minutes.
# 4. [03](03_loss.ipynb), to the end of "What $\beta$ does", then "The same loss in sDPO's words": where the loss comes from. This is the heart. 70 minutes.
# 5. [05](05_partition.ipynb), to the end of "One source, measured": which data first. 25 minutes.
# 6. [06](06_trainer.ipynb), to the end of "What is measured", then "One step", "The schedule" and "A stage in ten lines": one stage of training. 45 minutes.
# 7. [14](14_stepwise.ipynb): the stages. 45 minutes.
#
# **To align a model of your own, about an hour.** [Your model, your pairs](your_model.ipynb), the [demo](demo.ipynb), then the heads of [01](01_preferences.ipynb) (formats), [05](05_partition.ipynb) (order), [08](08_evaluate.ipynb) (did it work?) and [11](11_report.ipynb) (the report).
#
# **Everything, with every line of code, some forty hours** (thirty-three without the sections that you may skip), and fourteen more for the experiments. In the order of the numbers. A number is also a floor: the code of a chapter uses only chapters with smaller numbers.
#
# ## Words
#
# | word | in this book | more |
# |---|---|---|
# | reward accuracy | in training: share of pairs on which the policy's $\gamma$ is above the reference's. Of a source, before training: share on which S's $\gamma$ is above zero. Ties count one half | [05](05_partition.ipynb) |
# | Bradley-Terry | the model of a comparison: the better response wins with probability $\sigma$(difference of rewards) | [03](03_loss.ipynb) |
# | certificate | the least mean $\gamma$ that a given loss guarantees | [03](03_loss.ipynb) |
# | checkpoint | all that is needed to go on as if nothing had happened | [06](06_trainer.ipynb) |
# | chunk | the pairs of one stage | [12](12_plan.ipynb) |
# | gain | $\gamma$ of the policy minus $\gamma$ of the reference | [03](03_loss.ipynb) |
# | held out | pairs that are never trained on, only measured | [08](08_evaluate.ipynb) |
# | log-probability | logarithm of a probability; of a response, the sum over its tokens | [02](02_logprobs.ipynb) |
# | log-ratio | of a response: its log-probability under the policy minus that under the reference ("of chosen", "of rejected") | [08](08_evaluate.ipynb) |
# | margin | reward of the chosen response minus that of the rejected one: $\beta$ times the gain | [06](06_trainer.ipynb) |
# | packing | several pairs in one row without padding, each prompt read once | [04](04_packing.ipynb) |
# | partition | which pairs are trained on in which stage | [05](05_partition.ipynb) |
# | policy | the model that is being trained | [03](03_loss.ipynb) |
# | precision (fp32, bf16, fp16) | how many digits a computation keeps | [06](06_trainer.ipynb) |
# | probe | a few hundred pairs of a chunk on which every model is measured | [12](12_plan.ipynb) |
# | reference | the frozen model that the policy is compared with; here a table of what it said | [02](02_logprobs.ipynb) |
# | run | all stages, in one folder | [10](10_folder.ipynb) |
# | source | a named set of preference pairs | [01](01_preferences.ipynb) |
# | stage | one DPO training on one chunk | [06](06_trainer.ipynb) |
# | step | one update of the weights | [06](06_trainer.ipynb) |
# | true reward | in the tiny world only: how good a response really is | [00](00_world.ipynb) |
#
# ## Questions to test yourself
#
# 1. Why do people compare two answers instead of grading one?
#
# <details><summary>Answer</summary>
#
# Grades differ from person to person and from day to day; a comparison asks less and is more reliable. It is also what a person can do who could not have written either answer.
#
# </details>
#
# 2. What would happen to a policy that is trained on pairs without any reference?
#
# <details><summary>Answer</summary>
#
# Without a reference, $\gamma_{ref}$ is zero: the policy is compared with a model that finds all responses equally likely. S is in the loss nowhere. The optimum then knows the pairs and nothing else, and what S could do besides is lost.
#
# </details>
#
# 3. Why is the first loss of every stage $\ln 2$?
#
# <details><summary>Answer</summary>
#
# At the start of a stage the policy is its own reference, so the gain is zero on every pair, and $-\log\sigma(0) = \log 2$.
#
# </details>
