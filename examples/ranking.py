"""A bi-encoder tuned on NDCG@10 itself: a few words have to find their text."""

from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

from objectives import NDCG, BiEncoder
from support.passages import passage_queries
from zo_adapt import ParameterView, minimize

# Your own: lists of {"query": text, "documents": [texts], "relevance": [0, 2, ...]}.
folder, train, test = passage_queries()
encoder = AutoModel.from_pretrained(folder)
encoder = get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
# Read from the first token, which this encoder was not trained for: there is something to learn.
scorer = BiEncoder(encoder, AutoTokenizer.from_pretrained(folder), pooling="first", max_length=16)
train, test = ([scorer.encoded(query) for query in part] for part in (train, test))

ndcg = NDCG(scorer, k=10)
print(f"held-out NDCG@10 before: {ndcg(test).mean():.3f}")
# One query of the budget is a whole list: here 8 documents and what is searched for.
result = minimize(ndcg, ParameterView.trainable(encoder), train, batch_size=16, max_queries=4_000)
print(f"held-out NDCG@10 after: {ndcg(test).mean():.3f}\n{result}")
