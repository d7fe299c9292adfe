"""The word lists and sentence patterns of the synthetic reviews (data only, see reviews.py).

A pattern names other entries in braces. An entry whose name ends in "+" or "-" is looked up with
the polarity of the sentence that is being written. Both polarities share their patterns, and
their word lists are equally long and drawn uniformly: praise is exactly as likely as blame, so a
search can steer the sentiment without leaving what the base model finds likely.

Words of the lists without a sign are neutral for VADER, those of the signed lists have their sign.
"""


def words(text: str) -> list[str]:
    """The entries of a list that is written as one string; "_" stands for a space in an entry."""
    return [word.replace("_", " ") for word in text.split()]


TITLE_FIRST = words(
    "Silver Paper Quiet Northern Hidden Hollow Distant Painted Seventh Winter Velvet Midnight "
    "Amber Wooden Copper Eastern Salt Borrowed Second Crooked"
)
TITLE_SECOND = words(
    "Harbour Lantern Orchard Station River Garden Mirror Bridge Island Letter Window Summer "
    "Kitchen Forest Tower Carousel Road Piano Market Shore"
)

COMMON: dict[str, list[str]] = {
    "adj+": words(
        "superb brilliant charming wonderful lovely delightful elegant impressive beautiful "
        "excellent perfect great good terrific fantastic amazing gorgeous splendid stunning "
        "enjoyable satisfying pleasant magnificent awesome"
    ),
    "adj-": words(
        "awful dull terrible boring bad weak horrible dreadful disappointing ugly poor pathetic "
        "annoying irritating miserable messy ridiculous useless dreary dismal depressing lousy "
        "nasty worthless"
    ),
    "noun+": words("joy delight triumph treat pleasure masterpiece success winner"),
    "noun-": words("mess disaster failure waste insult shame bore disappointment"),
    "verb+": words("loved enjoyed adored admired liked"),
    "verb-": words("hated disliked loathed despised resented"),
    "feeling+": words("happy delighted impressed thrilled charmed amused pleased relaxed"),
    "feeling-": words("bored annoyed angry disappointed tired confused frustrated miserable"),
    "return+": ["love to", "be happy to", "be glad to"],
    "return-": ["hate to", "be mad to", "be sad to"],
    "outcome+": words("joy pleasure delight"),
    "outcome-": words("pain waste mistake"),
    "did+": words("laughed smiled cheered"),
    "did-": words("complained suffered cried"),
    "very": ["", "", "", "very ", "rather ", "quite ", "really ", "simply ", "so "],
    "link": words(
        "still, also, then_again, on_the_whole, after_an_hour, and_yet, as_for_me, this_time "
        "at_first later_on, for_the_most_part by_then"
    ),
    "aside": ["I thought,", "for once,", "to my mind,", "as ever,", "all in all,", "in the end,"],
    "relative": words(
        "sister brother neighbour cousin daughter son mother father colleague flatmate uncle "
        "aunt teacher"
    ),
    "day": words("Monday Tuesday Thursday Friday Saturday Sunday"),
    "number": words("two three four five seven ten twelve twenty"),
    "place": words(
        "Lisbon Prague Naples Dublin Vienna Oslo Porto Turin Lyon Leeds the_north the_old_town "
        "the_islands the_mountains the_coast the_village another_country the_suburbs"
    ),
    "season": words("spring summer autumn winter"),
    "first": words("Anna Marco Elena Tomas Ruth Oscar Nina Paul Ivan Clara Hugo Rosa"),
    "last": words("Keller Moreau Lindgren Okafor Rossi Tanaka Novak Hayes Silva Brandt"),
    "person": ["{first} {last}"],
    "role": words(
        "a_young_baker a_piano_teacher a_retired_sailor a_clerk a_farmer an_old_painter "
        "a_student a_doctor a_taxi_driver a_gardener a_nurse a_tailor two_sisters a_judge "
        "a_pilot three_students a_postman a_cook"
    ),
    "journey": words(
        "on_the_way_to_{place} from_{place}_to_{place} through_one_{season} back_to_{place} "
        "across_{place} who_moves_to_{place} who_works_in_{place}"
    ),
    "opinion": [
        "{one} was {very}{adj}.",
        "{one} was {very}{adj}.",
        "{many} were {very}{adj}.",
        "{many} were {very}{adj}.",
        "{one} felt {adj} and {adj}.",
        "{many} looked {adj} to me.",
        "I {verb} {one}.",
        "we {verb} {many}.",
        "my {relative} {verb} {one}.",
        "I {verb} {one} and my {relative} {verb} {many}.",
        "{one} was a {noun}.",
        "{one}, {aside} was {adj}.",
        "even {one} seemed {very}{adj}.",
        "I found {one} {very}{adj}.",
        "I thought {many} were {very}{adj}.",
        "{link} {one} was {very}{adj}.",
        "{link} I {verb} {many}.",
        "{link} we {did}.",
        "my {relative} {did} because of {one}.",
        "what a {noun} {one} was!",
        "there was something {adj} about {one}.",
        "{one} left me {feeling}.",
        "{many} made us {feeling}.",
        "it was a {adj} {thing} with {adj} {plural}.",
        "these were {adj} {plural}.",
        "you can expect {adj} {plural}.",
        "all of us were {feeling} with {one}.",
    ],
    "ending": [
        "I would {return} {again}.",
        "it would be a {outcome} to {again}.",
        "we went home {feeling}.",
        "in short, a {adj} {thing}.",
        "a {noun}!",
    ],
    "fact": [
        "my {relative} told my {relative} about {one}.",
        "{one} reminded my {relative} of {place}.",
        "we talked about {one} and {many}.",
        "{link} my {relative} asked about {one}.",
        "{many} reminded us of {place}.",
        "I noticed {one} and my {relative} noticed {many}.",
        "{link} we discussed {many}.",
        "my {relative} took the {number} o'clock tram to {place}.",
    ],
    "object_rest": [" with my {relative}.", " in {place}.", " after work.", " in the rain."],
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
    "adj+": words("funny clever entertaining exciting inspired fascinating"),
    "adj-": words("stupid lazy confusing frustrating embarrassing painful"),
    "thing": ["film", "picture", "drama", "movie"],
    "singular": words(
        "acting plot story ending music script camera cast dialogue pace first_act final_scene "
        "opening director lead_actor sound"
    ),
    "plural": words("songs actors effects costumes scenes characters images lines sets twists"),
    "again": ["see it again", "watch it again", "sit through it again"],
    "fact": [
        "it follows {role} {journey}.",
        "the story follows {role} {journey}.",
        "{person} stars as {role}.",
        "{person} and {person} filmed {one} in {place}.",
        "{many} come from {place}.",
        "{person} wrote {one} with {person}.",
    ],
    "subject_rest": [
        " follows {role} {journey}.",
        " is set in {place}.",
        " was directed by {person}.",
        " takes place in {place}.",
    ],
}

BOOK: dict[str, list[str]] = {
    "adj+": words("funny clever entertaining exciting inspired fascinating"),
    "adj-": words("stupid lazy confusing frustrating embarrassing painful"),
    "thing": ["book", "story", "volume", "read"],
    "singular": words(
        "plot writing story ending style dialogue pace narrator translation first_chapter "
        "last_page opening author main_character cover"
    ),
    "plural": words("chapters characters letters pages images lines scenes twists footnotes"),
    "again": ["read it again", "open it again", "pick it up again"],
    "fact": [
        "it follows {role} {journey}.",
        "the story follows {role} {journey}.",
        "{many} begin in {place} and end in {place}.",
        "I read {many} on the train to {place}.",
        "{person} wrote {many} in {place}.",
        "{one} is about {role} and {role}.",
    ],
    "subject_rest": [
        " follows {role} {journey}.",
        " is set in {place}.",
        " was written by {person}.",
        " takes place in {place}.",
    ],
}

RESTAURANT: dict[str, list[str]] = {
    "adj+": words("delicious fresh heavenly friendly warm sweet"),
    "adj-": words("disgusting bitter rotten dirty rude horrid"),
    "thing": ["place", "restaurant", "kitchen", "dinner"],
    "singular": words(
        "soup fish bread service menu salad coffee dessert cake room music house_wine "
        "main_course waiter chef terrace"
    ),
    "plural": words("starters noodles vegetables sauces dishes waiters tables portions drinks"),
    "again": ["eat there again", "go back", "book a table again"],
    "fact": [
        "we sat near the {spot} with my {relative}.",
        "I ordered the {dish} and my {relative} had the {dish}.",
        "{person} runs it with {person}.",
        "{many} and {one} come from {place}.",
        "{one} came after the {dish} and {many}.",
        "{person} brought {one}.",
    ],
    "spot": words("door window stairs piano mirror bar garden street wall entrance"),
    "dish": words("soup fish noodles salad lamb pasta rice beans tart curry cheese mussels"),
    "subject_rest": [
        " is a short walk from {place}.",
        " opened last {season}.",
        " serves food from {place}.",
        " has {number} tables.",
    ],
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
        ("My {relative} took me to see {title}", "object"),
        ("I have just seen {title}", "object"),
    ],
    "book": [
        ("The book", "subject"),
        ("This book", "subject"),
        ("The book {title}", "subject"),
        ("The story {title}", "subject"),
        ("{title} by {person}", "subject"),
        ("Last {season} I read {title}", "object"),
        ("My {relative} gave me {title}", "object"),
        ("I have just read {title}", "object"),
    ],
    "restaurant": [
        ("The restaurant", "subject"),
        ("This place", "subject"),
        ("The {title}", "subject"),
        ("Dinner at the {title}", "subject"),
        ("Last night we ate at the {title}", "object"),
        ("On {day} I had dinner at the {title}", "object"),
        ("My {relative} took us to the {title}", "object"),
    ],
}
