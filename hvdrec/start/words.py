"""Words in the names of columns and files that tell what a column or table holds."""

from __future__ import annotations

import re
from collections.abc import Collection


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


USER = _set(
    "user customer member visitor viewer account client player reader buyer household person "
    "people profile cookie listener subscriber shopper guest passenger session"
)
ITEM = _set(
    "item product movie film article song track artist book video ad sku goods news post "
    "listing content isbn asin game app course recipe restaurant business hotel offer show "
    "doc document story campaign creative merchant good"
)
USER_FACTS = _set("age gender sex occupation income birth zip education married")
ITEM_FACTS = _set("title price genre brand category author year release artist colour")
TIME = _set("time timestamp ts date datetime at day when created shown moment")
LABEL = _set(
    "click clicked label target like liked purchased bought converted conversion watched "
    "played installed ordered positive favorite favourite subscribed"
)
RATING = _set("rating stars star score grade")
ATTENTION = _set("watch dwell duration seconds listen playtime")
OUTCOME = LABEL | RATING | ATTENTION | _set("purchase revenue spent review comment engaged")
"""Words for facts that are known only after the item was shown."""
CODES = _set("id code zip zipcode postcode type category class kind group level")
TITLE = _set("title name headline")
ACTIONS = {
    **dict.fromkeys(("impression", "impressions", "show", "shown", "exposure", "expose"), 0),
    **dict.fromkeys(("view", "visit", "pageview", "detail", "open", "product_view", "skip"), 1),
    **dict.fromkeys(("click", "play", "pv"), 2),
    **dict.fromkeys(("like", "cart", "add_to_cart", "addtocart", "favorite", "fav", "save"), 3),
    **dict.fromkeys(("share", "wishlist", "add", "watch", "listen", "download", "follow"), 3),
    **dict.fromkeys(("purchase", "buy", "order", "transaction", "bought", "checkout"), 4),
}
"""Name of an action -> how much it says about the user's interest, from 0 to 4."""


def words(name: str) -> list[str]:
    """Split a name into lower-case words without plural s: ``userIDs`` gives user, id."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    found = [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]
    return [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in found]


def says(name: str, vocabulary: Collection[str]) -> bool:
    """Return True if a name holds one of the words, alone or joined with "id", as in userid."""
    found = words(name)
    joined = {word.removesuffix("id") for word in found} | {"".join(found)}
    return any(word in vocabulary for word in (*found, *joined) if word)
