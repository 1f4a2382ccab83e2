"""The networks and tokenizers of the embedded model `tiny`."""

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from alignbench.embedded.drawing import lettering, scenes
from alignbench.embedded.drawing.palette import COLORS

SEQUENCE_LENGTH = 16
WORD_WIDTH, LETTER_WIDTH = 96, 64
TEXT_WIDTH = WORD_WIDTH + LETTER_WIDTH
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
"""Special tokens in the order of their ids. CLIPModel uses the state of the end token; if its id is 2, as in old configs, it
uses the token with the highest id instead."""
EOS_ID = 3
LATENT_CHANNELS = 12
PATCH = 4
"""Pixels per latent, in each direction."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the words of drawn prompts; other words are spelt, and a quoted text becomes one quotation mark."""
    wordings = [*lettering.PLAIN_WORDINGS, *lettering.COLORED_WORDINGS, *scenes.PREFIXES]
    known = {w for text in wordings for w in text.replace('"{text}"', "").replace("{color}", "").split()}
    known |= {*COLORS, *scenes.SHAPES, *scenes.PLURALS.values(), *scenes.NUMBERS.values(), "a", "an", "and"}
    known |= {w for relation in scenes.RELATIONS for w in relation.split()}
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)]
    pieces = [*letters, *(f"##{c}" for c in letters), *'".,;:!?-&+', *sorted(w for w in known if len(w) > 1)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex('"[^"]*"?'), ' " ')])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _fast(tokenizer, vocabulary)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the letters of the first quoted text, one token per letter; other text gives no token."""
    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)] + list(" '.,;:!?-&+")
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    before, after = normalizers.Replace(Regex('^[^"]*("|$)'), ""), normalizers.Replace(Regex('"[^"]*'), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), before, after])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return _fast(tokenizer, vocabulary)


def silent_third_encoder() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A third text encoder that returns one zero vector for every prompt, as SD3's pipeline does without a third encoder.

    Without it, `from_pretrained` would need an argument; with it, the folder opens directly. With `max_sequence_length=1` both
    ways give the same embeddings. It has one layer because transformers 4 cannot open a T5 without layers.
    """
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(".+"), "")
    encoder = T5EncoderModel(T5Config(vocab_size=2, d_model=TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    return encoder, PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=1, pad_token="<pad>", unk_token="<unk>"
    )


def _fast(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    ends = [(SPECIAL[t], vocabulary[SPECIAL[t]]) for t in ("bos_token", "eos_token")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=SEQUENCE_LENGTH, **SPECIAL)


def build_autoencoder() -> AutoencoderKL:
    """The untrained autoencoder, which halves the resolution twice (64x64x3 to 16x16x12)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # With several groups, each would have its own scale over the whole image, and plain backgrounds would lose their level.
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def build_text_encoder(vocabulary: int, width: int, layers: int) -> CLIPTextModelWithProjection:
    """An untrained text encoder with this vocabulary size, width and number of layers."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=SEQUENCE_LENGTH,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        initializer_factor=1.0,
    )
    model = CLIPTextModelWithProjection(config)
    # With CLIP's own initialisation (0.02), layers drown the identity of a token, and colours and letters take long to learn.
    embeddings = model.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.4)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.15)
    return model


def build_transformer(text_width: int) -> SD3Transformer2DModel:
    """The untrained transformer, for text embeddings of this width."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=text_width,
        caption_projection_dim=128,
        pooled_projection_dim=text_width,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


class TextAndTransformer(nn.Module):
    """The modules of stage 2, from prompt ids to velocity, connected as in `StableDiffusion3Pipeline`."""

    def __init__(self, words: int, letters: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(words, WORD_WIDTH, layers=3)
        self.text_encoder_2 = build_text_encoder(letters, LETTER_WIDTH, layers=2)
        self.transformer = build_transformer(TEXT_WIDTH)

    def forward(self, x: Tensor, sigma: Tensor, word_ids: Tensor, letter_ids: Tensor) -> Tensor:
        """Computes the velocity, [N, C, 16, 16], for latents of that shape, sigma [N] and token ids [N, SEQUENCE_LENGTH]."""
        first = self.text_encoder(word_ids, output_hidden_states=True)
        second = self.text_encoder_2(letter_ids, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        # One zero vector replaces the third encoder, since the call's `max_sequence_length` is 1.
        states = torch.cat([states, states.new_zeros(len(states), 1, states.shape[-1])], dim=1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return self.transformer(
            x, encoder_hidden_states=states, pooled_projections=pooled, timestep=sigma * 1000, return_dict=False
        )[0]


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    """Token ids of prompts, int64 [N, SEQUENCE_LENGTH], padded and truncated."""
    return tokenizer(prompts, padding="max_length", max_length=SEQUENCE_LENGTH, truncation=True, return_tensors="pt").input_ids
