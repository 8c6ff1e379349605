"""Commands on stored files: `dis-scale verify`, `gc` and `delete` of a sweep; `dis-scale data verify`, `repair`, `show`, `gc`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dis_scale.cli.shared import AsJson, SweepUrl, VaeOption, console, naming_misspelt, require_png, say, show, working
from dis_scale.process.errors import DisScaleError, UserError, counted

if TYPE_CHECKING:
    from dis_scale.upkeep.retention import Note, Unneeded

Yes = Annotated[bool, typer.Option("--yes", help="Delete what is listed.")]

Latents = Annotated[str, typer.Argument(help="A sweep's folder, or a folder of latents; local or any fsspec URL.")]


def verify_results(sweep: SweepUrl, *, as_json: AsJson = False) -> None:
    """Read all files that a sweep's results need; name those that are damaged, missing or refused, with exit code 1."""
    from dis_scale.process.progress import Board
    from dis_scale.sweep import Sweep
    from dis_scale.upkeep.verify import verify_sweep

    with Board(console(stderr=as_json)) as board, board.working("verify"):
        found = verify_sweep(Sweep.open(sweep), lambda done, total: board.update("verify", done, total, "files"))
        for what, lines in found._asdict().items():
            for line in lines:
                board.say(f"{what:8} {line}")
    complete = "complete all files that the results need were read and match their hashes"
    show(found._asdict(), *([] if any(found) else [complete]), as_json=as_json)
    wrong = [f"{counted(len(found.damaged), 'file')} damaged or missing"] if found.damaged else []
    wrong += [f"{counted(len(found.refused), 'file')} could not be read, and may be good"] if found.refused else []
    if wrong:
        raise DisScaleError(f"{sweep}: {'; '.join(wrong)}")


def gc(sweep: SweepUrl, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """List what no result needs, with its size: samples of finished evaluations, old leases, ...

    Also latents of the storage root that no sweep uses. A metric that is added to the recipe later generates deleted samples again.
    """
    from dis_scale.sweep import Sweep
    from dis_scale.upkeep import retention

    opened, notes = Sweep.open(sweep), list[retention.Note]()
    with working("gc: listing"):
        unneeded = retention.find_unneeded(opened)
        try:
            unneeded += retention.find_unused(opened.store)
        except UserError as error:  # a sweep there runs or has no latents yet, so it may come to use any
            notes.append(retention.Note("kept", str(error)))
    delete = partial(retention.delete, unneeded)
    _list_or_delete(unneeded, notes, delete if yes else None, as_json=as_json, remedy=f"dis-scale gc {sweep} --yes")


def data_gc(
    root: Annotated[str, typer.Argument(help="A storage root: latents and listings are below it, and its sweeps.")],
    *,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """List the latents and listings below a storage root that no sweep there uses.

    Refused while a sweep there runs or has no latents yet.
    """
    from dis_scale.upkeep import retention

    with working("data gc: listing"):
        with naming_misspelt(root):
            store = retention.open_store(root)
        unneeded = retention.find_unused(store)
    delete = partial(retention.delete, unneeded)
    _list_or_delete(unneeded, [], delete if yes else None, as_json=as_json, remedy=f"dis-scale data gc {root} --yes")


def _list_or_delete(
    parts: "list[Unneeded]", notes: "list[Note]", delete: Callable[[], object] | None, *, as_json: bool, remedy: str
) -> None:
    """Print the parts, and what is kept; delete the former by `delete`, without which the remedy is printed."""
    files, size_bytes = sum(len(each.sizes) for each in parts), sum(each.size_bytes for each in parts)
    if not as_json:
        for each in parts:
            say(f"{each.kind:<12} {each.folder}: {counted(len(each.sizes), 'file')}, {each.size_bytes / 1e6:,.1f} MB")
        for note in notes:
            say(f"{note.kind:<12} {note.words}")
    if delete:
        with working("deleting"):
            delete()
    total = f"{size_bytes / 1e6:,.1f} MB in {counted(files, 'file')}"
    document = {
        "parts": [each.to_json() for each in parts], "notes": [note._asdict() for note in notes],
        "files": files, "bytes": size_bytes, "deleted": delete is not None,
    }  # fmt: skip
    words = f"deleted      {total}" if delete else f"total        {total}; to delete them: {remedy}"
    show(document, words, as_json=as_json)


def delete(sweep: SweepUrl, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """List all that would be deleted with a sweep, and what stays for others: dis-scale delete outputs/sweeps/digits --yes

    Also latents and listing, unless another sweep of the storage root uses or may use them. Refused while the sweep runs.
    """
    from dis_scale.sweep import Sweep
    from dis_scale.upkeep import removal

    with working("delete: listing"):
        removed = removal.find(Sweep.open(sweep))
    delete = partial(removal.delete, removed)
    remedy = f"dis-scale delete {sweep} --yes"
    _list_or_delete(removed.parts, removed.notes, delete if yes else None, as_json=as_json, remedy=remedy)


def forgive(
    sweep: SweepUrl,
    node: Annotated[str, typer.Argument(help="The node's name, as `dis-scale status` prints it.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Forget the failures of a node's devices after its repair: training uses it again from its next attempt on."""
    from dis_scale.sweep import Sweep, state

    failures = state.forgive_node(Sweep.open(sweep), node)
    show({"node": node, "forgiven": failures}, f"forgiven {node}: {failures} failures of its devices", as_json=as_json)


def data_verify(
    url: Latents,
    *,
    fast: Annotated[bool, typer.Option("--fast", help="Compare sizes only; read nothing back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare all shards with the manifest and name each damaged one; exit code 1 if there is any."""
    from dis_scale.data import maintenance
    from dis_scale.process.progress import Board

    with Board(console(stderr=as_json)) as board, board.working("verify"):
        with naming_misspelt(url):
            sweep, latents = maintenance.locate_latents(url)
        damaged = maintenance.verify(latents, fast=fast, report=lambda done, total: board.update("verify", done, total, "shards"))
        show({"latents": latents.url, "damaged": damaged}, as_json=as_json)
        for words in damaged.values():
            board.say(f"damaged  {words}")
        maintenance.require_undamaged(latents, damaged, sweep)
        board.say(f"complete {latents}{' by its sizes' if fast else ''}")


def data_repair(
    sweep: Annotated[str, typer.Argument(help="The sweep's folder; its recipe names the images and the VAE.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Rebuild the damaged shards, byte for byte as they were."""
    from dis_scale.data import maintenance
    from dis_scale.process.progress import Board, listing_words

    with naming_misspelt(sweep), Board(console(stderr=as_json)) as board, board.working("repair"):
        repaired = maintenance.repair(
            sweep,
            lambda done, total: board.update("verify", done, total, "shards"),
            lambda done, total: board.update("rebuild", done, total, "shards"),
            listing_words(board.say),
        )
        board.say(f"repaired {', '.join(repaired)}" if repaired else "nothing to repair: every shard is complete")
    show({"repaired": repaired}, as_json=as_json)


def data_export(
    url: Latents,
    out: Annotated[str, typer.Option(help="The new folder; local or any fsspec URL.")],
    layout: Annotated[Literal["edm2", "repa", "webdataset"], typer.Option(help="Whose layout.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Write latents for the code of EDM2, REPA (which needs its images beside them) or MaskDiT (`webdataset`).

    Without those of mirror images, which these layouts do not have.
    """
    from dis_scale.data import given, maintenance
    from dis_scale.process.progress import Board
    from dis_scale.storage.folder import open_folder

    with Board(console(stderr=as_json)) as board, board.working("export"):
        with naming_misspelt(url):
            _, latents = maintenance.locate_latents(url)
        folder = open_folder(out)
        count = given.export(latents, layout, folder, lambda done, total: board.update("export", done, total, "shards"))
    show({"latents": count, "folder": folder.url}, f"exported {count:,} latents to {folder} as {layout}", as_json=as_json)


def data_show(
    url: Latents,
    out: Annotated[Path, typer.Option(help="The PNG of decoded images to write.")] = Path("latents.png"),
    vae: VaeOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON; write no images.")] = False,
) -> None:
    """Show totals, labels, statistics and identity of latents; write a grid of images above what the VAE makes of them."""
    import numpy as np

    from dis_scale.data import maintenance
    from dis_scale.evaluation.sampling import COLUMNS, grid
    from dis_scale.process.progress import listing_words
    from dis_scale.sweep import Sweep
    from dis_scale.sweep.documents import LatentsManifest

    with naming_misspelt(url):
        sweep, latents = maintenance.locate_latents(url)
    if as_json:
        return show(as_json=True, document=LatentsManifest.require(latents).to_json() | {"latents": latents.url})
    for line in maintenance.describe(latents):
        say(line)
    with working("data show: loading the autoencoder"):
        decoder = maintenance.load_decoder(sweep, latents, vae)
    if decoder is None:
        say("grid     none: to decode images, give the sweep's folder or --vae")
        return
    require_png(out)
    with working("data show: decoding"):
        examples = maintenance.decode_examples(latents, decoder)
    pictures, names = examples.decoded, examples.names
    try:
        originals = examples.originals(Sweep.open(sweep.url), listing_words(say)) if sweep else None
    except DisScaleError as error:
        originals = None
        say(f"error    not known, the originals cannot be read: {error}")
    if originals is not None:
        say(f"error    {examples.error_words(originals)}")
        rows, white = range(0, len(pictures), COLUMNS), -len(pictures) % COLUMNS  # white pictures fill the last row
        pairs = np.pad([originals, pictures], ((0, 0), (0, white), (0, 0), (0, 0), (0, 0)), constant_values=255)
        pictures = np.concatenate([row for i in rows for row in pairs[:, i : i + COLUMNS]])
        names = [*names, *[""] * white]
        names = [name for i in rows for name in (*names[i : i + COLUMNS], *[""] * COLUMNS)]
    out.write_bytes(grid(pictures, COLUMNS, names))
    say(f"grid     {out}")
