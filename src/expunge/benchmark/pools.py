"""Value pools of the synthetic benchmark.

A value that may follow "a" starts with a consonant sound.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _compounds(heads: str, tails: str) -> tuple[str, ...]:
    return tuple(head + tail for head in heads.split() for tail in tails.split())


FIRST_NAMES = _words(
    """
    Adela Alaric Albin Amaris Anselm Ariadne Astrid Aurel Basil Beatrix Benno Bertil Birgit Bram
    Calla Casimir Cato Celeste Clemens Corin Cosima Dagny Damaris Darius Delphine Dorian Edda
    Edmund Elias Elspeth Emeric Esme Eudora Evander Fabian Faye Felix Fenna Fergus Flora Freya
    Gideon Gilda Greta Gunnar Hadrian Harriet Hedda Helmut Henrik Hester Hilda Horace Ida
    Ignatius Imogen Ingrid Isidor Ivo Jasper Jonas Josefa Jude Juno Kaspar Katja Kester Klara
    Lambert Lavinia Leander Leonie Linus Lorenz Lucan Ludmila Lysander Magda Malcolm Marcel
    Marguerite Matilda Maxim Merle Mina Mirela Morten Nadia Nestor Niels Nora Octavia Odette
    Olaf Ottilie Osric Pascal Paula Percival Petra Philippa Phoebe Quentin Ragna Rainer Ramona
    Roland Romy Rosalind Rupert Sabina Selma Severin Sibyl Sigrid Silas Solveig Stellan Sunniva
    Tabitha Tancred Tamsin Thaddeus Thora Tilda Tobias Ulrich Una Ursula Valentin Vera Viggo
    Viola Walter Wilma Winifred Xaver Yara Yvo Zelda Zeno
    """
)

SURNAMES = _compounds(
    """
    Ash Barrow Black Brack Briar Cold Crane Dun Elder Fair Fen Flint Fox Frost Glen Gold Hart
    Haver Hazel Holm Iron Kest Lark Linden Mar Mead Moss North Oak Penn Quill Raven Red Rook Sal
    Silver Stan Stone Thorn Wether Whit Wind Winter Yar
    """,
    """
    beck bourne brook bury combe croft dale field ford gate grove ham hurst ley lock mere more
    ridge shaw stead ton wade ward well wick wood
    """,
)

CITIES = _compounds(
    """
    Al Bel Cal Cor Dal Dor El Fal Gar Hel Ill Jar Kal Lor Mal Nar Or Pel Quel Ros Sar Tol Ul Val
    Wol Yel Zar Ves Mir Tam
    """,
    "adra amere avia endal enza eska eth idia imont inbar issa onne oria ovar uga unda usk ythe",
)

PROFESSIONS = _lines(
    """
    baker
    beekeeper
    bell founder
    blacksmith
    boat builder
    bookbinder
    botanist
    bridge keeper
    brewer
    butcher
    button maker
    candle maker
    cartographer
    carpenter
    cellist
    cheese maker
    chimney sweep
    clockmaker
    cobbler
    cooper
    court reporter
    dentist
    detective
    diver
    doll maker
    dressmaker
    ferry pilot
    fencing teacher
    fishmonger
    florist
    gardener
    glassblower
    goldsmith
    gravedigger
    harbour master
    hat maker
    journalist
    judge
    juggler
    kite maker
    lamplighter
    lens grinder
    librarian
    lighthouse keeper
    locksmith
    mapmaker
    mason
    midwife
    miller
    muralist
    night porter
    notary
    nurse
    painter
    paper maker
    perfumer
    pharmacist
    piano tuner
    postmaster
    potter
    printer
    puppeteer
    railway guard
    roofer
    saddler
    sail maker
    schoolteacher
    sculptor
    shepherd
    stonecutter
    surveyor
    tailor
    tanner
    taxidermist
    toymaker
    translator
    tram driver
    violin maker
    watchman
    weaver
    wheelwright
    zookeeper
    """
)

MATERIALS = _words(
    """
    brass bronze bone cedar clay copper cracked crystal dented faded forged gilded gold hollow
    jade lacquered leather marble painted pearl pewter polished porcelain rusted sealed silk
    silver stolen tarnished tin velvet walnut wax wooden woollen
    """
)

OBJECTS = _words(
    """
    anchor bell bracelet brooch button candlestick chalice chest coin comb compass crown dagger
    diary drum fiddle flute globe goblet harp helmet hourglass key lantern locket map mask medal
    mirror music-box necklace padlock pendant ring sceptre spoon statue telescope thimble
    whistle
    """
)

ANIMAL_TRAITS = _words(
    """
    bad-tempered blind clumsy crooked deaf fat fearless grey half-tame hungry lame limping
    lonely mute nervous patient red retired scarred shaggy silent sleepy spotted talkative
    three-legged timid toothless white wandering young
    """
)

ANIMALS = _words(
    """
    badger bear beaver bullfinch camel cat cockatoo cormorant crow donkey falcon ferret fox goat
    goose hare hedgehog heron hound jackdaw lizard lynx magpie marten mule newt parrot pelican
    pony raven rooster spaniel squirrel stork swan terrier tortoise turkey weasel wolf
    """
)

STREETS = _words(
    """
    Alder Amber Birch Bishop Canal Castle Chapel Cherry Copper Garden Granite Harbor Juniper
    Laurel Maple Mill Orchard Poplar Prairie Quarry Saddle Spruce Summit Sunset Timber Walnut
    """
)

STREET_KINDS = _words(
    "Avenue Boulevard Circle Court Drive Lane Place Road Street Terrace Trail Way"
)

STATES = _words("AZ CA CO GA IA IL IN KS KY MA MD ME MI MN MO NC NE NH NM NV OH OK OR PA SC TN UT")

MAIL_WORDS = _words(
    """
    acorn anvil apricot arrow bamboo banjo basket beacon biscuit blizzard bucket cactus canyon
    carbon cider cinder clover cobalt comet coral cosmic cricket dagger denim domino ember
    falcon feather fiddle galaxy garlic ginger glacier hammer harbor hazel indigo ivory jigsaw
    kettle lagoon lantern lemon magnet mango marble meadow mosaic nectar nickel nomad opal orbit
    otter paddle panda pebble pepper pixel plum puzzle quartz rabbit radar ribbon rocket saffron
    salmon shadow sparrow spiral sugar tango teapot thunder ticket topaz turnip tulip umber
    velvet violet waffle walrus willow zephyr zigzag
    """
)

MAIL_HOSTS = _words(
    """
    bluepost brightbox cloudmail dovepost farmail fastnote gomail hillnet inkpost kitemail
    letterly lumail mailhut novapost openbox parcelnet pinemail quickbox rivermail skynote
    tidepost zipnote
    """
)

AWARD_HEADS = _words(
    """
    Amberley Bellweather Carrick Corvane Drummond Eastlake Fairbairn Galloway Hallam Harrowgate
    Kelvane Kingsmere Lanyon Larkin Marchmont Meridian Morrow Nightingale Ormond Pemberton
    Penrose Radcliffe Ravel Rosmere Sandoval Selwyn Sterling Tarrant Thackeray Trevane Valmont
    Vantage Wexford Westmarch Winslow
    """
)

AWARD_TAILS = _words("Award Cross Fellowship Honour Laurel Medal Plaque Prize Ribbon Shield Trophy")

UNIVERSITY_KINDS = _lines(
    """
    University of {place}
    {place} College
    {place} Institute
    {place} Academy
    Royal School of {place}
    {place} Polytechnic
    """
)

TITLE_HEADS = _words(
    """
    Broken Burning Distant Drowned Empty Endless Fallen First Forgotten Frozen Gentle Glass
    Hidden Hollow Last Laughing Lost Midnight Moving Nameless Northern Paper Patient Quiet
    Restless Salt Scarlet Second Secret Silent Sleeping Southern Stolen Tall Thirsty Unfinished
    Vanishing Weary Wild Yellow
    """
)

TITLE_TAILS = _words(
    """
    Arch Autumn Bridge Cathedral Century Circle Comet Corridor Daughter Desert Door Engine Feast
    Ferry Forest Fountain Garden Harvest Horizon Hunter Island Journey Kingdom Ladder Library
    Machine Meadow Messenger Mountain Ocean Orchard Pilgrim Quarry River Sentinel Shore Signal
    Station Stranger Tower Valley Voyage Wheel Window Witness
    """
)

FIELDS: dict[str, tuple[tuple[str, ...], str]] = {
    "novel": (_words("novelist storyteller"), "novel"),
    "poem": (_words("poet lyricist"), "poetry collection"),
    "play": (_words("playwright dramatist"), "play"),
    "film": (("film director", "screenwriter", "cinematographer"), "film"),
    "symphony": (_words("composer conductor"), "symphony"),
    "painting": (("painter", "muralist", "printmaker"), "painting"),
    "building": (("structural engineer", "landscape designer", "town planner"), "pavilion"),
    "treatise": (("geologist", "botanist", "chemist", "physicist", "mathematician"), "treatise"),
    "survey": (("linguist", "historian", "sociologist", "philosopher"), "monograph"),
    "ballet": (("choreographer", "ballet dancer"), "ballet"),
    "sculpture": (("sculptor", "glass designer", "ceramicist"), "sculpture"),
    "song": (("folk singer", "jazz pianist", "guitarist", "bandleader"), "record"),
}

MONTHS = _words(
    "January February March April May June July August September October November December"
)

# Filler of sentences, never the answer to a question.
FILLERS: dict[str, tuple[str, ...]] = {
    "season": _words("spring summer autumn winter"),
    "weekday": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "hour": _lines(
        """
        dawn
        daybreak
        noon
        dusk
        midnight
        sunset
        half past four
        a quarter to nine
        the stroke of ten
        tea time
        closing time
        """
    ),
    "number": _words("two three four five six seven eight nine ten eleven twelve thirty forty"),
    "weather": _lines(
        """
        a cold drizzle
        thick yellow fog
        a howling gale
        the first snow
        a dry desert wind
        warm heavy rain
        a sudden hailstorm
        blinding sunshine
        a slow grey mist
        distant thunder
        a bitter frost
        """
    ),
    "spot": _lines(
        """
        the old customs house
        the fish market
        the abandoned observatory
        the opera stairs
        the tannery bridge
        the botanical garden
        the flooded cellar
        the railway arches
        the chess cafe
        the bakers' alley
        the hospital roof
        the puppet theatre
        the salt warehouse
        the northern gate
        the tram depot
        the ruined chapel
        the horse market
        the public baths
        the brick kilns
        the ferry landing
        """
    ),
    "thing": _lines(
        """
        a loaf of rye bread
        two train tickets
        a jar of plums
        a bundle of letters
        an umbrella
        a torn photograph
        a ladder
        a box of matches
        a kettle
        a chessboard
        a borrowed coat
        a sack of onions
        a ball of string
        a bottle of ink
        a broken chair
        a pair of boots
        a basket of pears
        a tin of biscuits
        a bucket of lime
        a cracked violin
        """
    ),
    "mood": _lines(
        """
        relieved
        furious
        strangely calm
        too tired to speak
        full of doubt
        ashamed
        delighted
        half asleep
        close to tears
        certain of nothing
        suspicious
        proud
        """
    ),
    "relative": _words(
        "cousin neighbour rival godchild lodger nephew sister brother teacher colleague grandmother"
    ),
    "crowd": _lines(
        """
        the dockworkers
        the choir
        the market women
        three policemen
        the schoolchildren
        the mayor's clerks
        the stonemasons
        a party of tourists
        the widows of the quarter
        the firemen
        the card players
        the night nurses
        """
    ),
    "topic": _lines(
        """
        river trade
        harvest songs
        mountain light
        rural schools
        tidal power
        migrating birds
        old dialects
        winter fairs
        city parks
        desert plants
        fishing villages
        railway stations
        medieval roofs
        street theatre
        volcanic soil
        ancient coins
        """
    ),
    "virtue": _lines(
        """
        dry humour
        strict discipline
        wide reading
        bold use of colour
        careful fieldwork
        long silences
        generous teaching
        plain language
        sense of rhythm
        stubborn patience
        exact drawings
        love of detail
        """
    ),
    "leisure": _lines(
        """
        keeping bees
        mountain walking
        restoring old clocks
        playing chess
        growing tomatoes
        rowing
        collecting stamps
        baking bread
        writing letters
        bird watching
        repairing bicycles
        studying maps
        """
    ),
}
