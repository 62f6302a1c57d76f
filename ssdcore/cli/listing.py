"""`ssdcore models`."""


def models() -> str:
    """List the models that `train --model` knows, with their sizes.

    The parameters and GMACs (10^9 multiply-accumulates for one image) are counted on this machine.
    """
    from ssdcore.models.facts import table

    text = table()
    print(text)
    return text
