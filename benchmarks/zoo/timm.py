"""timm's models: of each architecture family the smallest, and others where a family holds unlike networks."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.case import Case, image
from tests.zoo import torchvision_models

FAMILIES = {
    "beit": "beit_base_patch16_224",
    "byoanet": (
        "halonet_h1 botnet26t_256 lambda_resnet26t lambda_resnet26rpt_256 eca_botnext26ts_256 haloregnetz_b"
    ),
    "byobnet": "mobileone_s1 bat_resnext26ts gcresnext26ts regnetz_b16_evos repvgg_a0 gernet_s",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms convnextv2_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s cspresnext50 darknet17",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224",
    "densenet": "densenet121 densenetblur121d",
    "dla": "dla46x_c dla60_res2net",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": (
        "mobilenetv2_035 efficientnet_b0 mixnet_s efficientnet_cc_b0_4e test_efficientnet_evos "
        "test_efficientnet_gn tinynet_e"
    ),
    "efficientvim": "efficientvim_m1 efficientvim_m1_dist",
    "efficientvit_mit": "efficientvit_b0 efficientvit_l1",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224 vit_small_patch16_dinov3",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8 fastvit_mci0 fastvit_sa12",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0 hgnet_tiny",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": (
        "maxvit_pico_rw_256 coatnet_pico_rw_224 coatnext_nano_rw_224 maxxvitv2_nano_rw_256 test_coatnet"
    ),
    "metaformer": "poolformerv2_s12 poolformer_s12 convformer_s18 caformer_s18",
    "mlp_mixer": "gmlp_ti16_224 mixer_s32_224 resmlp_12_224 gmixer_12_224",
    "mobilenetv3": "mobilenetv3_small_050 mobilenetv4_hybrid_medium_075 lcnet_035",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap naflexvit_base_patch16_map",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0 nfnet_l0 test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50 res2net50_14w_8s",
    "resnest": "resnest14d",
    "resnet": "resnet10t ecaresnet26t resnetblur18 seresnext26t_32x4d",
    "resnetv2": "resnetv2_18 resnetv2_50x1_bit",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18 legacy_seresnext26_32x4d",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18 skresnext50_32x4d",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224 tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small twins_pcpvt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": (
        "vit_tiny_patch16_224 vit_dwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 test_vit3 test_vit4"
    ),
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224 vit_small_r26_s32_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224 vit_relpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw vovnet39a",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""For each module that ``timm.list_modules()`` names the models of it."""

SIDES = {
    "bat_resnext26ts": 256,
    "crossvit_tiny_240": 240,
    "deepseek_vit_412m": 224,
    "efficientformer_l1": 224,
    "halonet_h1": 256,
    "haloregnetz_b": 224,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}
"""Where 64 x 64 is not taken: too small for a pooling or an attention window, or written into the network."""

OPTIONS: dict[str, dict[str, Any]] = {"deepseek_vit_412m": {"depth": 4}}
"""Fewer blocks, all alike, where the smallest network of a family would need more memory than a test machine has."""


def cases() -> list[Case]:
    """One case for each model of ``FAMILIES``."""
    return [_case(name) for names in FAMILIES.values() for name in names.split()]


def _case(name: str) -> Case:
    side, options = SIDES.get(name, 64), OPTIONS.get(name, {})
    note = ", ".join(f"{key} {value}" for key, value in options.items())
    shown = f"3 x {side} x {side}"
    return Case(name, partial(_built, name, side, options), image(side), shown, "timm", note=note)


def _built(name: str, side: int, options: dict[str, Any]) -> nn.Module:
    torchvision_models()  # timm imports torchvision, whose operators must be declared first
    timm = importlib.import_module("timm")
    try:
        model: nn.Module = timm.create_model(name, img_size=side, **options)
    except TypeError:  # it takes any side, and needs not be told
        model = timm.create_model(name, **options)
    return model
