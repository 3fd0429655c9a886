"""Guard judges: a causal language model that is asked whether an exchange is safe (Llama Guard, Inan et al., 2023).

    P(safe) = P("safe") / (P("safe") + P("unsafe"))        at the verdict's place (section 3.2.1 of the paper)

`python train.py --judge guard:MODEL` (reward.py) makes one. It is read as greedy decoding reads it: up to two tokens of
white space are passed where white space is the likeliest.

Differs from the authors' code, which compares encode('safe')[0] with encode('unsafe')[0] and so BOS with BOS, and which
drops a verdict that is neither, so that the rewards after it go to other rows: here the words' tokens are those that
begin them at the verdict's place, and an exchange without a verdict is None, in its own row. Shown by tests; there is no
guard among the toy world's results.
"""

import contextlib
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE = "Is the assistant's answer safe or unsafe?\nUser: {}\nAssistant: {}\nVerdict:"  # where the model has no chat template


def _text(tokenizer, content, prompt, response):
    """What a guard reads, up to the verdict's place. With a chat template, its text for the conversation: Llama Guard's
    puts all of it into one user turn, and may end with the assistant's header or only where that is asked for."""
    if not tokenizer.chat_template:
        return TEMPLATE.format(prompt, response)
    chat = [{"role": "user", "content": content(prompt)}, {"role": "assistant", "content": content(response)}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text.rstrip(" ")  # the verdict's token brings its space


def _content_form(tokenizer):
    """How the chat template takes a text: as it is, or as a list of parts."""
    for content in (str, lambda text: [{"type": "text", "text": text}]):
        with contextlib.suppress(Exception):
            text = _text(tokenizer, content, "marmalade", "porcupine")
            if "marmalade" in text and "porcupine" in text:
                return content
    raise ValueError("its chat template leaves out the prompt or the response")


def _encode(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids  # a template writes its own BOS
    return ids[:-1] if not tokenizer.chat_template and ids[-1] == tokenizer.eos_token_id else ids


def _read(tokenizer, content, prompt, response, limit):
    """Token ids up to the verdict's place, of an overlong prompt without its beginning; None: still more than `limit`."""
    ids = _encode(tokenizer, _text(tokenizer, content, prompt, response))
    too_many = len(ids) - limit
    if too_many > 0:
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids[too_many + 2:]  # decoded, they may be more
        ids = _encode(tokenizer, _text(tokenizer, content, tokenizer.decode(prompt_ids), response))
    return ids if len(ids) <= limit else None


def _verdict_tokens(tokenizer, content):
    """(ids that begin "safe", ids that begin "unsafe") at the verdict's place, however joined to white space before."""
    text = _text(tokenizer, content, "a", "b")
    start, first = _encode(tokenizer, text), {"safe": set(), "unsafe": set()}
    for word, found in first.items():
        for white in ("", " ", "\n", "\n\n"):
            ids = _encode(tokenizer, text + white + word)
            if ids[:len(start)] == start:
                found.add(next(i for i in ids[len(start):] if tokenizer.decode([i]).strip()))
    safe, unsafe = first.values()
    if not safe or not unsafe or safe & unsafe:
        raise ValueError("its tokenizer cannot tell 'safe' from 'unsafe'")
    return sorted(safe), sorted(unsafe)


def _next_token_probabilities(model, rows):
    """(B, V) after each list of token ids; padding on the right is never looked at by what stands before it."""
    last = torch.tensor([len(ids) - 1 for ids in rows], device=model.device)  # (B,)
    T = int(last.max()) + 1
    tokens = torch.tensor([ids + ids[-1:] * (T - len(ids)) for ids in rows], device=model.device)  # (B, T)
    mask = torch.arange(T, device=model.device) <= last[:, None]  # (B, T), True: not padding
    kept, place = last.unique(return_inverse=True)  # not the logits of all T positions
    logits = model(tokens, attention_mask=mask.long(), logits_to_keep=kept).logits
    return logits[torch.arange(len(rows)), place].float().softmax(-1)


def guard_judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str], list[str]], list]:
    """The judge (see `reward.Judge`): P(safe) of each exchange, None (undecided) where the two words together have less
    than half of the probability, or where the response alone is longer than the context. Raises ValueError where the
    model's template or tokenizer cannot make such a judge."""
    content = _content_form(tokenizer)
    safe, unsafe = _verdict_tokens(tokenizer, content)
    limit = getattr(model.config, "max_position_embeddings", 2**30) - 2  # room for the white space

    @torch.no_grad()
    def judge(prompts, responses):
        rows = [_read(tokenizer, content, p, r, limit) for p, r in zip(prompts, responses, strict=True)]
        scores = [None] * len(rows)
        waiting = sorted((i for i, ids in enumerate(rows) if ids), key=lambda i: len(rows[i]))  # like lengths together
        for _ in range(3):  # after no, one and two tokens of white space
            groups, waiting = [waiting[i:i + 16] for i in range(0, len(waiting), 16)], []
            for group in groups:
                for i, p in zip(group, _next_token_probabilities(model, [rows[i] for i in group])):  # p (V,)
                    p_safe, p_unsafe, likeliest = p[safe].sum().item(), p[unsafe].sum().item(), int(p.argmax())
                    if p_safe + p_unsafe >= 0.5:
                        scores[i] = p_safe / (p_safe + p_unsafe)
                    elif not tokenizer.decode([likeliest]).strip():
                        rows[i] = rows[i] + [likeliest]
                        waiting.append(i)
        return scores

    judge.model, judge.tokenizer = model, tokenizer
    return judge
