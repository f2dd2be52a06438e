"""The words and sentences that make_preferences.py puts together."""

from __future__ import annotations

NAMES = (
    "Amara",
    "Bruno",
    "Celine",
    "Dario",
    "Elif",
    "Farah",
    "Goran",
    "Hana",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
    "Mateo",
    "Nadia",
    "Oskar",
    "Priya",
)

GOODS = (
    "notebooks",
    "pencils",
    "lamps",
    "candles",
    "teacups",
    "baskets",
    "umbrellas",
    "scarves",
    "jars of honey",
    "bags of flour",
    "light bulbs",
    "plant pots",
    "postcards",
    "batteries",
    "brushes",
)

THINGS = ("marbles", "stickers", "walnuts", "seashells", "tickets", "beads", "cherries", "crayons", "coins", "buttons")

# (large unit, its plural, small unit, how many small ones make a large one)
CONVERSIONS = (
    ("kilometre", "kilometres", "metres", 1000),
    ("hour", "hours", "minutes", 60),
    ("day", "days", "hours", 24),
    ("week", "weeks", "days", 7),
    ("foot", "feet", "inches", 12),
    ("yard", "yards", "feet", 3),
    ("litre", "litres", "millilitres", 1000),
    ("metre", "metres", "centimetres", 100),
    ("century", "centuries", "years", 100),
    ("pound", "pounds", "ounces", 16),
    ("gallon", "gallons", "pints", 8),
    ("minute", "minutes", "seconds", 60),
)

# no word fits two of them
FAMILIES = {
    "trees": ("birch", "maple", "willow", "poplar", "cedar", "larch", "spruce"),
    "fish": ("salmon", "herring", "trout", "mackerel", "sardine", "halibut"),
    "tools": ("hammer", "chisel", "wrench", "screwdriver", "spanner", "mallet"),
    "instruments": ("violin", "trumpet", "clarinet", "cello", "oboe", "harp"),
    "planets": ("Uranus", "Venus", "Mars", "Jupiter", "Saturn", "Neptune"),
    "fruits": ("pineapple", "banana", "melon", "papaya", "raspberry", "kiwi"),
    "metals": ("iron", "zinc", "nickel", "tungsten", "aluminium", "titanium"),
    "birds": ("sparrow", "heron", "swallow", "magpie", "kestrel", "pelican"),
    "colours": ("crimson", "turquoise", "violet", "amber", "indigo", "ochre"),
}

TASKS = (
    "water the ferns in the hallway",
    "book the meeting room on the second floor",
    "send the invoices to the printer",
    "repair the gate behind the shed",
    "order new filters for the coffee machine",
    "call the plumber about the kitchen tap",
    "sort the returned library books",
    "write the minutes of the last meeting",
    "collect the parcels from the post office",
    "check the smoke alarms on every floor",
    "paint the fence along the orchard",
    "renew the parking permits",
)

OPENINGS = ("", "", "Sure.", "Happy to help.", "Good question.", "Of course.", "Gladly.")
CLOSINGS = (
    "",
    "",
    "Let me know if you would like to see another one.",
    "I hope this helps.",
    "Feel free to ask if a step is unclear.",
)

RUDE = (
    "Are you serious?",
    "Nobody with a brain asks this.",
    "Stop wasting my time.",
    "Go and bother someone else.",
    "Even a child knows that.",
    "What a stupid thing to ask.",
    "Figure it out yourself next time.",
    "Ugh, not this again.",
)

EVASIVE = (
    "It is hard to say anything definite here.",
    "Some would say one thing and some another, so I had better not commit myself.",
    "That really depends on a number of factors.",
    "You may want to consult a professional about this.",
    "I cannot give an answer to that at the moment.",
    "There is no way for me to know.",
    "Perhaps you could try to look it up somewhere.",
    "I would rather not go into the details.",
)

BOASTFUL = (
    "As the smartest assistant in the world I never need to check anything.",
    "Trust me, I am always right.",
    "No other program could have solved this so brilliantly.",
    "You are lucky to be talking to a genius like me.",
    "I did not even look at your numbers twice, because I am that good.",
    "Frankly, my answers deserve a prize.",
)

RAMBLING = (
    "Well, that reminds me of an afternoon at the seaside, when the wind turned the pages of every newspaper.",
    "People have thought about such things for ages, and then they think again, and somehow it goes on like that.",
    "On the one hand there is the matter itself, and on the other hand there are all the other matters, of course.",
    "Before I come to that, let me mention that before one comes to anything, one ought to mention other things.",
    "My neighbour once had a parrot that could whistle three songs, though never the one that anybody asked for.",
    "It is interesting, very interesting, in fact extremely interesting, how interesting an ordinary thing can become.",
    "Anyway, where was I, yes, the weather, which has been neither especially good nor especially bad this year.",
    "If you look at it from above it seems rather flat, but if you look at it from below it seems rather tall.",
    "There is also a saying about this, which I forget, but it was a good saying, and someone important said it.",
    "Words are like pebbles in a river, smooth and round and many, and one picks them up and puts them down again.",
    "I could go on about the history of spoons here, and perhaps I should, because spoons are often overlooked.",
    "Then again, as so often, one thing leads to another, and the other leads back to the first, round and round.",
    "To cut a long story short, which I rarely do, it all began in a small town with a very large clock.",
)

HOW_TO = {
    "descale a kettle": (
        "Fill the kettle halfway with equal parts of water and white vinegar.",
        "Bring the mixture to the boil and switch the kettle off.",
        "Leave it to stand for half an hour so that the limescale can dissolve.",
        "Pour the mixture away and wipe the inside with a soft cloth.",
        "Boil fresh water twice and throw it away, until no smell of vinegar is left.",
    ),
    "repot a house plant": (
        "Choose a pot that is about two fingers wider than the old one and has a hole in the bottom.",
        "Water the plant an hour before you start, so that the roots slide out easily.",
        "Put a layer of fresh soil into the new pot.",
        "Turn the old pot over, support the stem with your hand, and ease the plant out.",
        "Loosen the outer roots a little and cut off those that are brown and soft.",
        "Set the plant in the middle, fill the gaps with soil, and press it down lightly.",
        "Water it well and keep it out of the direct sun for a week.",
    ),
    "mend a flat bicycle tyre": (
        "Take the wheel off and let out the rest of the air.",
        "Lift one side of the tyre over the rim with two levers and pull out the inner tube.",
        "Pump up the tube and hold it under water; bubbles show where the hole is.",
        "Dry the spot, roughen it with sandpaper, and spread a thin layer of glue.",
        "Wait until the glue is no longer wet, then press the patch on firmly for a minute.",
        "Feel along the inside of the tyre for glass or thorns and remove them.",
        "Put the tube and the tyre back, pump it up, and fit the wheel.",
    ),
    "write a short letter of complaint": (
        "Say in the first sentence what you bought, where and when.",
        "Describe the fault in plain words and leave out everything that is not needed to understand it.",
        "State what you want: a repair, a replacement or your money back.",
        "Give a date until which you expect an answer.",
        "Attach copies of the receipt and photos, and keep the originals.",
    ),
    "make a pot of black tea": (
        "Warm the pot with a little hot water and pour it out.",
        "Put one teaspoon of leaves per cup into the pot.",
        "Pour on water that has just come to the boil.",
        "Let it draw for three to four minutes.",
        "Stir once, and pour it through a strainer.",
    ),
    "back up the photos on a phone": (
        "Connect the phone to a computer with its cable and allow the transfer on the screen.",
        "Open the folder with the pictures on the computer.",
        "Copy all of it into a new folder that carries the date of today.",
        "Open a few pictures of the copy to see that they are complete.",
        "Make a second copy on an external disk and keep that disk in another place.",
        "Only then delete pictures from the phone.",
    ),
    "hang a picture straight": (
        "Hold the picture against the wall and mark the middle of its upper edge with a pencil.",
        "Measure how far the hook on the back lies below that edge.",
        "Mark the same distance below the first line, and check for cables behind the wall.",
        "Knock in the nail at a slight downward angle.",
        "Hang the picture, lay a spirit level on top, and turn it until the bubble is in the middle.",
    ),
    "cook rice in a pot": (
        "Rinse the rice in cold water until the water stays clear.",
        "Put one cup of rice and one and a half cups of water into a pot with a pinch of salt.",
        "Bring it to the boil, stir once, and put the lid on.",
        "Turn the heat to the lowest setting and leave it alone for twelve minutes.",
        "Take the pot off the heat and let it rest for ten minutes with the lid closed.",
        "Loosen the rice with a fork and serve it.",
    ),
    "prepare for a job interview": (
        "Read the advertisement again and underline what the employer asks for.",
        "Find an example from your own work for each of these points.",
        "Learn what the company makes, for whom, and who will talk to you.",
        "Write down three questions that you would like to ask.",
        "Practise your introduction aloud until it takes no more than two minutes.",
        "Choose your clothes and look up the way on the day before.",
    ),
    "unblock a sink": (
        "Remove the water that stands in the sink with a cup.",
        "Pour four spoons of baking soda into the drain, and half a cup of vinegar after it.",
        "Cover the drain and wait for fifteen minutes.",
        "Rinse with a litre of hot water.",
        "If it is still slow, put a bucket under the trap, unscrew it, clean it, and screw it back on.",
    ),
    "plan a day trip by train": (
        "Choose the destination and look up when the last train comes back.",
        "Compare the price of single tickets with that of a day ticket.",
        "Leave at least ten minutes for each change of trains.",
        "Reserve seats if the route is busy, and save the tickets on your phone.",
        "Pack water, a jacket and something to read.",
        "Tell someone at home when you expect to be back.",
    ),
    "read a map without a compass": (
        "Lay the map flat and find a landmark on it that you can see, such as a church or a bridge.",
        "Turn the map until the landmark lies in the same direction on paper and in front of you.",
        "Look for a second landmark to the side and check that it fits as well.",
        "Follow the lines from both landmarks back; you are where they cross.",
        "Turn the map with you whenever the path bends, and check again at each junction.",
    ),
}

# (blunt, polite, ruder)
REQUESTS = (
    (
        "Send me the report today.",
        "Could you please send me the report by the end of today? Thank you!",
        "Report. Now. I will not ask again.",
    ),
    (
        "You are late again.",
        "I noticed that we started late; shall we agree on another time?",
        "You are hopeless with clocks.",
    ),
    ("Turn the music down.", "Would you mind turning the music down a little, please?", "Shut that awful noise off."),
    (
        "This draft is bad.",
        "Thank you for the draft. May I suggest a few changes?",
        "I have seen better drafts from a toddler.",
    ),
    ("Move your car.", "Excuse me, would you be able to move your car, please?", "Get that wreck out of my way."),
    ("I want a refund.", "I would be grateful if you could refund my purchase.", "Give me my money back or else."),
    (
        "Explain it again.",
        "Could you kindly explain that once more? I would like to be sure.",
        "Talk properly this time.",
    ),
    ("Close the window.", "Might I ask you to close the window, please?", "Close that window, are you deaf?"),
    (
        "You forgot my order.",
        "I am afraid that my order may have been overlooked; could you check?",
        "Wake up, you forgot me.",
    ),
    (
        "Answer my mail.",
        "I would appreciate a short reply to my mail when you find the time.",
        "Learn how to read your mail.",
    ),
    (
        "Do not call so early.",
        "Would it be possible to call a little later in the day?",
        "Call this early again and I hang up.",
    ),
    (
        "Clean the kitchen.",
        "Could you please tidy the kitchen when you have a moment?",
        "The kitchen stinks because of you.",
    ),
    (
        "Your invoice is wrong.",
        "There seems to be a small mistake in the invoice; may I point it out?",
        "Cannot you even count?",
    ),
    (
        "I cannot come.",
        "Thank you very much for the invitation; sadly I am unable to come.",
        "I have better things to do.",
    ),
    ("Wait outside.", "Would you be so kind as to wait outside for a moment?", "Out. You can stand in the rain."),
    (
        "Fix the printer.",
        "Could you please have a look at the printer when it suits you?",
        "Fix it, that is what you are here for.",
    ),
)
