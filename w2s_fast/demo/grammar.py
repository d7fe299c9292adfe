"""The word lists and sentence patterns of the synthetic reviews (data only, see reviews.py).

A pattern names other entries in braces. An entry whose name ends in "+" or "-" is looked up with
the polarity of the sentence that is being written. Both polarities share their patterns, and
their word lists are equally long and drawn uniformly: praise is exactly as likely as blame, so a
search can steer the sentiment without leaving what the base model finds likely.

Words of the lists without a sign are neutral for VADER, those of the signed lists are not; a test
holds that.
"""

TITLE_FIRST = (
    "Silver Paper Quiet Northern Hidden Hollow Distant Painted Seventh Winter Velvet Midnight "
    "Amber Wooden Copper Eastern Salt Borrowed Second Crooked"
).split()
TITLE_SECOND = (
    "Harbour Lantern Orchard Station River Garden Mirror Bridge Island Letter Window Summer "
    "Kitchen Forest Tower Carousel Road Piano Market Shore"
).split()

COMMON: dict[str, list[str]] = {
    "adj+": (
        "superb brilliant charming wonderful lovely delightful funny elegant impressive beautiful "
        "excellent perfect great good terrific fantastic amazing gorgeous graceful clever "
        "thrilling enjoyable splendid stunning entertaining satisfying exciting inspired "
        "pleasant fascinating"
    ).split(),
    "adj-": (
        "awful dull terrible boring bad weak horrible dreadful disappointing stupid lazy ugly "
        "painful poor pathetic annoying irritating miserable messy ridiculous confusing useless "
        "dreary dismal frustrating depressing lousy embarrassing nasty worthless"
    ).split(),
    "noun+": "joy delight triumph treat pleasure masterpiece success winner".split(),
    "noun-": "mess disaster failure waste insult shame bore disappointment".split(),
    "verb+": "loved enjoyed adored admired liked".split(),
    "verb-": "hated disliked regretted despised loathed".split(),
    "feeling+": "happy delighted impressed thrilled charmed amused pleased relaxed".split(),
    "feeling-": "bored annoyed angry disappointed tired confused frustrated miserable".split(),
    "return+": ["love to", "be happy to", "be glad to"],
    "return-": ["hate to", "be mad to", "be afraid to"],
    "outcome+": "joy pleasure delight".split(),
    "outcome-": "pain waste mistake".split(),
    "very": ["", "", "", "very ", "rather ", "quite ", "really ", "simply ", "so "],
    "link": ["still,", "also,", "then again,", "on the whole,", "after an hour,", "and yet,"]
    + ["as for me,", "this time"],
    "aside": ["I thought,", "for once,", "to my mind,", "as ever,", "all in all,", "in the end,"],
    "companion": "sister brother neighbour cousin daughter son mother father colleague".split(),
    "day": "Monday Tuesday Thursday Friday Saturday Sunday".split(),
    "number": "two three four five seven ten twelve twenty".split(),
    "place": ["Lisbon", "Prague", "Naples", "the north", "the old town", "a small island"]
    + ["the mountains", "the coast", "a village", "another country"],
    "season": "spring summer autumn winter".split(),
    "first": "Anna Marco Elena Tomas Ruth Oscar Nina Paul".split(),
    "last": "Keller Moreau Lindgren Okafor Rossi Tanaka Novak Hayes".split(),
    "person": ["{first} {last}"],
    "role": ["a young baker", "two sisters", "a retired sailor", "a piano teacher", "a clerk"]
    + ["a farmer", "an old painter", "three students", "a doctor", "a taxi driver"],
    "journey": ["on the way to {place}", "during one {season} in {place}", "from {place} to {place}"]
    + ["through one {season}", "back to {place}", "across {place}"],
    "opinion": [
        "{one} was {very}{adj}.",
        "{one} was {very}{adj}.",
        "{many} were {very}{adj}.",
        "{many} were {very}{adj}.",
        "{one} felt {adj} and {adj}.",
        "I {verb} {one}.",
        "we {verb} {many}.",
        "my {companion} {verb} {one}.",
        "{one} was a {noun}.",
        "{one}, {aside} was {adj}.",
        "I found {one} {very}{adj}.",
        "I thought {many} were {very}{adj}.",
        "{link} {one} was {very}{adj}.",
        "{link} I {verb} {many}.",
        "what a {noun} {one} was!",
        "there was something {adj} about {one}.",
        "{one} left me {feeling}.",
        "{many} made us {feeling}.",
        "it was a {adj} {thing} with {adj} {plural}.",
        "these were {adj} {plural}.",
    ],
    "ending": [
        "I would {return} {again}.",
        "it would be a {outcome} to {again}.",
        "we went home {feeling}.",
        "in short, a {adj} {thing}.",
        "a {noun}!",
    ],
    "fact": [
        "we talked about it on the way home.",
        "it was our {number}th visit to that street.",
        "my {companion} told me about it in {season}.",
        "I went with my {companion} and my {companion}.",
        "it rained all {day}.",
        "we had heard about it from my {companion}.",
    ],
    "object_rest": [
        " with my {companion}.",
        " on {day}.",
        " last {season}.",
        " in {place}.",
    ],
    "object_rest_opinion": [
        " and {verb} it.",
        ", and it was {very}{adj}.",
        ", and it left me {feeling}.",
        ", which was a {noun}.",
    ],
    "subject_rest_opinion": [
        " was {very}{adj}.",
        " is a {adj} {thing}.",
        " was a {noun}.",
        " left me {feeling}.",
        " has {adj} {plural}.",
    ],
}

FILM: dict[str, list[str]] = {
    "thing": ["film", "picture", "drama", "comedy"],
    "singular": "acting plot story ending music script camera cast dialogue pace".split()
    + ["first act", "final scene", "opening", "director", "lead actor"],
    "plural": "songs actors jokes costumes scenes characters images lines sets twists".split(),
    "again": ["see it again", "watch it again", "sit through it again"],
    "fact": [
        "it follows {role} {journey}.",
        "the story follows {role} {journey}.",
        "{person} plays {role}.",
        "it was filmed in {place} in {season}.",
        "it runs for about {number} hours.",
        "most of it takes place in {place}.",
        "{person} wrote it with {person}.",
    ],
    "subject_rest": [" follows {role} {journey}.", " is set in {place}."]
    + [" was directed by {person}.", " takes place in {place}."],
}

BOOK: dict[str, list[str]] = {
    "thing": ["book", "novel", "story", "read"],
    "singular": "plot writing story ending style dialogue pace narrator translation".split()
    + ["first chapter", "last page", "opening", "author", "main character"],
    "plural": "chapters characters letters pages jokes images lines scenes twists".split(),
    "again": ["read it again", "open it again", "pick it up again"],
    "fact": [
        "it follows {role} {journey}.",
        "the story follows {role} {journey}.",
        "it has {number} chapters.",
        "it is set in {place} in {season}.",
        "I read it on the train to {place}.",
        "{person} wrote it in {place}.",
        "the narrator is {role}.",
    ],
    "subject_rest": [" follows {role} {journey}.", " is set in {place}."]
    + [" was written by {person}.", " takes place in {place}."],
}

RESTAURANT: dict[str, list[str]] = {
    "thing": ["place", "restaurant", "kitchen", "dinner"],
    "singular": "soup fish bread service menu salad coffee dessert cake room music".split()
    + ["house wine", "main course", "waiter", "chef"],
    "plural": "starters noodles vegetables sauces dishes waiters tables portions drinks".split(),
    "again": ["eat there again", "go back", "book a table again"],
    "fact": [
        "we sat near the {spot}.",
        "I ordered the {dish} and my {companion} had the {dish}.",
        "it is a short walk from the {spot}.",
        "it opened last {season}.",
        "{person} runs it with {person}.",
        "the menu has {number} pages.",
        "the chef comes from {place}.",
    ],
    "spot": "door window stairs station river market".split(),
    "dish": "soup fish noodles salad lamb pasta".split(),
    "subject_rest": [" is a short walk from the {spot}.", " opened last {season}."]
    + [" serves food from {place}.", " has about {number} tables."],
}

DOMAINS = {"film": FILM, "book": BOOK, "restaurant": RESTAURANT}

# (prompt, which "_rest" entry continues it). The first two of each domain name no title: they are
# seen in training, so that a prompt as bare as "The film" works, and are never held out.
OPENINGS: dict[str, list[tuple[str, str]]] = {
    "film": [
        ("The film", "subject"),
        ("This film", "subject"),
        ("The film {title}", "subject"),
        ("{title}", "subject"),
        ("The new film {title}", "subject"),
        ("Last night we saw {title}", "object"),
        ("On {day} I watched {title}", "object"),
        ("My {companion} took me to see {title}", "object"),
        ("I have just seen {title}", "object"),
    ],
    "book": [
        ("The book", "subject"),
        ("This novel", "subject"),
        ("The book {title}", "subject"),
        ("The novel {title}", "subject"),
        ("{title} by {person}", "subject"),
        ("Last {season} I read {title}", "object"),
        ("My {companion} gave me {title}", "object"),
        ("I have just read {title}", "object"),
    ],
    "restaurant": [
        ("The restaurant", "subject"),
        ("This place", "subject"),
        ("The restaurant {title}", "subject"),
        ("Dinner at {title}", "subject"),
        ("Last night we ate at {title}", "object"),
        ("On {day} I had dinner at {title}", "object"),
        ("My {companion} took us to {title}", "object"),
    ],
}
