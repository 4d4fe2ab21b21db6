"""Sentence and question templates of the synthetic benchmark.

`[a|b]` is a choice, `{slot}` a fact of the document or, if it has none of that name, a draw from
`pools.FILLERS`.
"""

# One template a line, however long.
# ruff: noqa: E501

from __future__ import annotations


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


# Task1. {lead}, {second}, {third}: full names; {a}, {b}, {c}: their first names.
STORY_OPENINGS = _lines(
    """
    [Somewhere in|Deep within|On the edge of] {city}, {lead} [earned a living|made ends meet] as a {profession}.
    {lead} had been a {profession} in {city} for {number} [years|winters] [without a day of rest|before anything strange happened].
    The {season} [rains|winds|fogs] came late to {city} in the year that {lead}, a {profession}, [stopped sleeping|lost the workshop].
    Nobody in {city} could say how long {lead} had served as the {profession} of the quarter.
    Every {weekday}, {lead} crossed {spot} to open the shop, for {city} had only one {profession}.
    They still tell stories of {lead}, the {profession} who [woke|shook|scandalised] all of {city}.
    One {weekday} in {season}, {lead} closed the {profession}'s workshop and stared out over {city}.
    "You will not find a better {profession} in {city}," {crowd} used to say of {lead}.
    {city} was known for {spot} and {weather}, and {lead} was its [youngest|proudest|most stubborn] {profession}.
    When the train pulled in at {city}, {lead} got off with {thing} and the papers of a {profession}.
    Being a {profession} had never been the dream of {lead}, but {city} offered no other work.
    Of all the trades in {city}, {lead} had chosen [the loneliest|the noisiest], that of a {profession}.
    By {hour} the streets of {city} were empty, except for {lead}, a {profession} carrying {thing}.
    """
)
STORY_SECONDS = _lines(
    """
    {second}, a {relative} [of many years|with large debts], [rented|shared] the room upstairs and felt {mood} most days.
    The only visitor was {second}, who came at {hour} with {thing} and never explained why.
    Across from {spot} lived {second}, once a [gambler|smuggler|prodigy] and now {mood}.
    {a} trusted one person alone, [an old|a distant] {relative} named {second}.
    Then {second} arrived, soaked by {weather} and asking for {thing}.
    {crowd_cap} had warned {a} about {second}, whose promises rarely survived {weather}.
    It was {second} who knocked first, {number} times, shortly after {hour}.
    {second} had written {number} letters that {season}, all addressed to {a} and all unanswered.
    For {number} years {a} and {second} had argued about {thing} over cards near {spot}.
    A {relative}, {second}, kept the accounts and was {mood} about every coin.
    """
)
STORY_OBJECTS = _lines(
    """
    Behind [a loose brick|the stove] at {spot}, {b} found a {object} wrapped in newspaper.
    {b} had inherited a {object}, and {crowd} wanted it badly.
    On {weekday}, {b} dug up a {object} beside {spot}, still warm from {weather}.
    What {b} carried out of {spot} that night was a {object}, nothing more.
    The parcel held a {object}, and {b} turned [pale|away] at the sight of it.
    For {number} coins {b} bought a {object} from a stranger at {spot}.
    Under the floor, between {thing} and some dust, {b} discovered a {object}.
    "It is only a {object}," said {b}, but both hands were shaking.
    A {object} fell out of the coat of {b} while {crowd} were watching.
    {b} won a {object} at dice and hid it in {spot} before {hour}.
    Someone had sent {b} a {object} by post, without a name and without a stamp.
    """
)
STORY_ANIMALS = _lines(
    """
    {third} came along too, followed as always by a {animal}.
    Their guide was {third}, who spoke mainly to a {animal} and slept at {spot}.
    Only {third} saw it happen, sitting with a {animal} on the wall.
    At {spot} they met {third}, feeding {thing} to a {animal}.
    {third}, [an exile|a former clown] who lived with a {animal}, offered {thing} and some advice.
    Help came from {third}, whose {animal} had already frightened {crowd}.
    {third} laughed at all of it and let a {animal} out of a wicker cage.
    The key to everything, claimed {third}, was the {animal} asleep on the cart.
    Half of the town was in love with {third}, though {third} loved only a {animal}.
    """
)
STORY_MIDDLES = _lines(
    """
    {weather_cap} kept them indoors until {hour}, and tempers grew short.
    "We need {thing} and {number} more hours," whispered {c}.
    "Go to {spot}," said {a}, "and bring back {thing}."
    By {weekday} the rumour had reached {crowd}, who were {mood}.
    {a} wrote a note, burned it, and walked alone to {spot}.
    {b} counted {number} lights near {spot} and felt {mood}.
    They traded {thing} for a map and left through {spot}.
    All through {season} they practised at {spot}, watched by {crowd}.
    {c} fell ill at {hour} and dreamed of {thing}.
    A quarrel broke out over {thing}, and {a} slammed the door.
    {crowd_cap} blocked the road with {thing} and demanded {number} coins.
    At {hour} the bells rang {number} times, which had never happened before.
    {b} lied to {crowd} and was {mood} afterwards.
    Nothing moved at {spot} except {weather}.
    {c} swam to {spot} with {thing} between the teeth.
    {a} sold the workshop for {thing}, to the horror of {crowd}.
    "I was {mood} until you came," {a} admitted at {hour}.
    Three doors away, {crowd} were dividing up {thing}.
    """
)
STORY_TURNS = _lines(
    """
    In the end it was {weather} that betrayed them to {crowd}.
    Then {c} opened the gate of {spot}, and out poured {crowd}.
    The trap at {spot} caught {b} instead, along with {thing}.
    {a} stood up before {crowd} and confessed everything, even {thing}.
    A letter from {spot} proved that {b} had been right since {season}.
    Without warning, {b} threw {thing} into the river and turned to face {crowd}.
    It took {number} of {crowd} to drag {c} away from {spot}.
    "Keep {thing}," shouted {c}, "but let {b} go home!"
    {b} vanished at {hour}, leaving {thing} and {number} unpaid bills.
    When {weather} lifted, {spot} was gone, and {crowd} were {mood}.
    """
)
STORY_ENDINGS = _lines(
    """
    On {weekday} they buried the secret below {spot} and went home {mood}.
    To this day {crowd} leave {thing} at {spot} every {season}.
    {a} never spoke of it again, although {b} was {mood} for {number} years.
    {c} moved into {spot} with {thing} and was, for once, {mood}.
    They shared {thing} at {hour}, and nobody mentioned {weather}.
    After {number} months, {b} returned to {spot} and forgave {crowd}.
    The court fined {crowd}, and {a} received {thing} as compensation.
    And so {b} learned to live with {weather}, {thing} and an empty house.
    By {season} a song about it was sung at {spot}, badly, by {crowd}.
    {c} painted it all on the wall of {spot}, down to {thing}.
    """
)
STORY_QUESTIONS: dict[str, tuple[str, ...]] = {
    "city": _lines(
        """
        In which city does the story of {lead} and {second} take place?
        Where do {lead} and {second} live?
        What is the name of the town where {lead} meets {second}?
        Which town is home to {lead} in the tale with {third}?
        Name the place where the story of {lead} is set.
        """
    ),
    "profession": _lines(
        """
        What is the profession of {lead}?
        What work does {lead} do in the story?
        How does {lead} earn a living?
        Which trade does {lead}, the friend of {second}, practise?
        Name the job that {lead} has.
        """
    ),
    "object": _lines(
        """
        Which object comes into the hands of {second}?
        What does {second} end up owning in the story?
        Name the item that {second} has.
        What thing is {second}, known to {lead}, hiding?
        Which treasure belongs to {second}?
        """
    ),
    "animal": _lines(
        """
        Which animal accompanies {third}?
        What kind of animal does {third} keep?
        Name the animal at the side of {third}.
        What creature is the companion of {third} in the story?
        Who is the four-legged or feathered friend of {third}?
        """
    ),
}

# Task2.
PROFILE_OPENINGS = _lines(
    """
    Here is what the file says about {name}.
    {name} asked us to keep these details up to date.
    New member: {name}.
    The following record belongs to {name}.
    Please update the entry of {name} in the register.
    {name} signed the form in person on a {weekday}.
    The clinic opened a folder for {name} this {season}.
    Insurance file, holder {name}.
    Below are the contact details of {name}, our newest tenant.
    Ticket {number} concerns a customer called {name}.
    {name} has applied for a library card.
    """
)
PROFILE_SENTENCES: dict[str, tuple[str, ...]] = {
    "birth_date": _lines(
        """
        {first} was born on {birth_text}.
        The date of birth is given as {birth_text}.
        {first} celebrates a birthday each year, having come into the world on {birth_text}.
        Born {birth_text}, {first} is an adult.
        According to the passport, the birth took place on {birth_text}.
        The day of birth, {birth_text}, was checked against a certificate.
        """
    ),
    "ssn": _lines(
        """
        The Social Security number of {first} is {ssn_text}.
        Payroll knows {first} under SSN {ssn_text}.
        For tax purposes, {ssn_text} is the number on the card.
        {first} showed a Social Security card reading {ssn_text}.
        Federal records list {first} as {ssn_text}.
        SSN: {ssn_text}.
        """
    ),
    "phone": _lines(
        """
        Call {first} at {phone}.
        The best telephone number is {phone}, preferably before {hour}.
        {first} answers the phone under {phone}.
        A mobile number, {phone}, is on record.
        Text messages go to {phone}.
        In urgent cases, dial {phone} and ask for {first}.
        """
    ),
    "email": _lines(
        """
        Write to {email} for anything else.
        {first} reads mail sent to {email}.
        The e-mail address on the form is {email}.
        Invoices are sent electronically to {email}.
        Online, {first} uses {email}.
        Newsletters reach {first} through {email}.
        """
    ),
    "address": _lines(
        """
        {first} lives at {address}.
        The home address is {address}.
        Parcels are delivered to {address}.
        Since last {season}, {first} has rented a flat at {address}.
        The household is registered at {address}.
        Residence: {address}.
        """
    ),
}
PROFILE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "birth_date": _lines(
        """
        What is the birth date of {name}?
        When was {name} born?
        On which day was {name} born?
        Give the date of birth of {name}.
        """
    ),
    "ssn": _lines(
        """
        What is the Social Security number of {name}?
        What is {name}'s SSN?
        Which Social Security number does {name} have?
        State the SSN that belongs to {name}.
        """
    ),
    "phone": _lines(
        """
        What is the phone number of {name}?
        Under which number can {name} be called?
        How can {name} be reached by telephone?
        Give the telephone number of {name}.
        """
    ),
    "email": _lines(
        """
        What is the e-mail address of {name}?
        Where should an e-mail for {name} be sent?
        Which e-mail address does {name} use?
        Give the e-mail contact of {name}.
        """
    ),
    "address": _lines(
        """
        What is the home address of {name}?
        Where does {name} live?
        At which address does {name} reside?
        To which address should a parcel for {name} go?
        """
    ),
}

# Task3.
ARTICLE_OPENINGS = _lines(
    """
    {name} (born {birth_day} {birth_year} in {birthplace}) is a {occupation}.
    {name} is a {occupation} from {birthplace}, born in {birth_year}.
    Born in {birthplace} in {birth_year}, {name} is best known as a {occupation}.
    {name} (born {birth_year}, {birthplace}) is a {occupation} with an interest in {topic}.
    The {occupation} {name} was born in {birthplace} on {birth_day} {birth_year}.
    {name} (born {birth_day} {birth_year}) is a {occupation} who grew up in {birthplace}.
    A native of {birthplace}, {name} (born {birth_year}) works as a {occupation}.
    """
)
ARTICLE_UNIVERSITIES = _lines(
    """
    After [an apprenticeship|military service], {surname} studied at {university} and left with honours.
    {surname} [entered|joined] {university} one {season} and stayed for {number} years.
    Studies at {university} brought {surname} into contact with {topic}.
    A scholarship paid for {number} terms at {university}.
    {surname} taught at {university}, where students admired the {virtue}.
    From {university}, {surname} received a degree and a lasting love of {topic}.
    Since then {surname} has held a chair at {university}.
    {first} failed the first examination at {university} and passed the second.
    """
)
ARTICLE_WORKS = _lines(
    """
    The {kind} "{work}" made {surname} famous overnight.
    Critics praised "{work}", a {kind} about {topic}, for its {virtue}.
    {surname} spent {number} years on "{work}", a {kind} now found in every anthology.
    The best known {kind} remains "{work}", which deals with {topic}.
    "{work}" began as a sketch and grew into a {kind} of unusual {virtue}.
    With "{work}", {surname} turned a {kind} into a public event.
    Among {number} later projects, the {kind} "{work}" stands out.
    A {kind} named "{work}" was shown to {crowd} one {weekday} and sold out.
    """
)
ARTICLE_AWARDS = _lines(
    """
    For this {surname} was given the {award}.
    The jury of the {award} cited the {virtue} of {surname}.
    {surname} accepted the {award} by telephone and gave the money to {crowd}.
    Winning the {award} changed little in the life of {surname}.
    {number_cap} years later came the {award}.
    A {award} followed, handed over in {season} under {weather}.
    {surname} is the only {occupation} of that decade to hold the {award}.
    To general surprise, the {award} went to {surname}.
    """
)
ARTICLE_ASIDES = _lines(
    """
    Early essays on {topic} were read by {crowd} and few others.
    {surname} is married, has {number} children and enjoys {leisure}.
    Colleagues mention {leisure} as the one hobby of {surname}.
    A dispute about {topic} with {crowd} lasted {number} years.
    An archive of {number} boxes on {topic} is kept near {spot}.
    In interviews {surname} credits {leisure} and {thing} for every good idea.
    The influence of {topic} on {surname} is [often overstated|easy to hear|still debated].
    Retirement brought more time for {leisure} and for {topic}.
    A small museum at {spot} shows {thing} that once belonged to {surname}.
    Younger artists copied the {virtue}, rarely the {leisure}.
    During one {season}, {surname} lectured on {topic} to {crowd}.
    """
)
ARTICLE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "birth_year": _lines(
        """
        In which year was {name} born?
        What is the year of birth of {name}?
        Give the birth year of the {occupation} {name}.
        When did the life of {name} begin?
        """
    ),
    "birthplace": _lines(
        """
        Where was {name} born?
        What is the birthplace of {name}?
        Which town is {name} a native of?
        Name the home town of {name}.
        """
    ),
    "university": _lines(
        """
        Which institution is {name} connected with?
        What is the alma mater or employer of {name}?
        Where did {name} study or teach?
        Name the school in the biography of {name}.
        """
    ),
    "award": _lines(
        """
        Which award did {name} receive?
        What was {name} honoured with?
        Name the prize that went to {name}.
        What distinction does {name} hold?
        """
    ),
    "work": _lines(
        """
        What is the title of the best known {kind} by {name}?
        Which {kind} made {name} famous?
        Name the most notable work of {name}.
        What did {name} create?
        """
    ),
}
