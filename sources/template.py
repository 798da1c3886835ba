"""Templates: the text between inputs, answers and demonstrations, or a tokenizer's own chat around them.

    <|im_start|>user\\n  demonstrations, or vectors · query  <|im_end|>\\n<|im_start|>assistant\\n  answer
    the head                                                the tail, at the end of every query

With --template chat demonstrations and query stand in one user turn, and the answer is the assistant's. What
a chat template writes by itself, a system turn for example, is part of the head; where it would write today's
date, a fixed one stands. Without a chat the head is the tokenizer's BOS, if any, and there is no tail.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common import UserError, check
from sources.text import Tokenizer, first_line

TEMPLATES = {  # before an answer; between demonstrations (before the first, without leading white space)
    "space": (" ", " "), "newline": ("\n", "\n\n\n"),
    "input-output": ("\nOutput: ", "\nInput: "),
    "chat": ("\n", "\n\n\n")}  # within the user's turn
SETTINGS = {"date_string": "26 Jul 2024", "enable_thinking": False}  # variables of Llama 3's, of Qwen 3's
SAMPLE = ("wash it\nwashes it\n\n\ntry it", "tries it")  # what a user and an assistant say, to look at


@dataclass
class Turns:
    """What stands around and between the texts of a template.

    head: ids before the demonstrations or vectors. tail: ids between a query and its answer. Texts: opening,
    before the first input of all; between, before each other; alone, before a first answer without input;
    bare, before each other such; before_answer, in a demonstration; reply, before the answer to a query.
    encode: a text to ids.
    """

    head: list[int]
    tail: list[int]
    opening: str
    between: str
    alone: str
    bare: str
    before_answer: str
    reply: str
    encode: Callable[[str], list[int]]

    @property
    def cue(self) -> str:
        """The words of `reply`, after which an answer is written: "\\nOutput:", or none."""
        return self.reply.rstrip()


def make_turns(template: str, tokenizer: Tokenizer) -> Turns:
    """The turns of one of TEMPLATES. Raises UserError for a template that a tokenizer cannot write."""
    if template == "chat":
        return chat_turns(tokenizer)
    before_answer, between = TEMPLATES[template]
    if "\n" in before_answer and tokenizer.encode("a\nb") in map(tokenizer.encode, ("a b", "ab")):
        raise UserError(f"--template {template}, but the tokenizer of {tokenizer.name} drops newlines, as "
                        "T5's do; use --template space")
    bare = before_answer if before_answer.strip() else between  # "Output: a", never "Input: a"
    return Turns(tokenizer.bos, [], between.lstrip(), between, bare.lstrip(), bare, before_answer,
                 before_answer, tokenizer.encode)


def chat_turns(tokenizer: Tokenizer) -> Turns:
    """The turns of a tokenizer's own chat template.

    They are cut out of a whole conversation, not of a generation prompt, so that what a template puts before
    an answer (Qwen 3: an empty thought) is there. Raises UserError for a tokenizer without a template, or
    with one whose conversation is not head, text, tail and answer side by side.
    """
    check((bool(tokenizer.hf.chat_template), f"--template chat, but the tokenizer of {tokenizer.name} has no "
           "chat template; give an instruct model, put its template into a file chat_template.jinja beside "
           "its tokenizer, or use --template newline"))
    asked, said = "MENDASKED", "MENDSAID"
    text = conversation(tokenizer, asked, said)
    check((text.count(asked) == text.count(said) == 1 and text.find(asked) < text.find(said),
           f"--template chat: the chat template of {tokenizer.name} does not write a user's text and an "
           f"answer once each ({text[:200]!r}); use --template newline"))
    head, rest = text.split(asked)
    tail, _ = rest.split(said)
    # a space joins the word after it: it is read with that
    opening, reply = (part[len(part.rstrip(" ")):] for part in (head, tail))
    lead, (before_answer, between) = parsed(tokenizer, "a"), TEMPLATES["chat"]
    turns = Turns(parsed(tokenizer, head.rstrip(" ")), parsed(tokenizer, "a" + tail.rstrip(" "))[len(lead):],
                  opening, between, opening, between, before_answer, reply,
                  partial(tokenizer.encode, after=True))
    found = turns.head + turns.encode(opening + SAMPLE[0]) + turns.tail + turns.encode(reply + SAMPLE[1])
    whole = parsed(tokenizer, conversation(tokenizer, *SAMPLE))
    check((found == whole[:len(found)], f"--template chat: a conversation by the chat template of "
           f"{tokenizer.name} has other tokens than its parts; use --template newline"))
    return turns


def conversation(tokenizer: Tokenizer, asked: str, said: str) -> str:
    """The text of a conversation of one user turn and one answer."""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    try:
        return tokenizer.hf.apply_chat_template(messages, tokenize=False, **SETTINGS)
    except Exception as error:  # a template is a program, with errors of its own
        raise UserError(f"--template chat: the chat template of {tokenizer.name} does not run "
                        f"({first_line(error)}); mend it, or use --template newline") from error


def parsed(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text of the template's own, in which <|im_end|> and its like are the tokens that they name."""
    backend = tokenizer.hf.backend_tokenizer
    try:
        backend.encode_special_tokens = False
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = True
