"""English words for the spelling tasks: our own list, with regular forms; look at TRAINED and HELD_OUT.

A list in the code, and not words of the text at hand, so that the questions are the same on every machine and for every
model. One stem in ten is held out for evaluation, with all its forms: a model that has seen "walked" has no advantage.
"""

from nanochat.data.microworld.dice import Dice

NOUNS = """
accident account acorn actor address adult adventure advocate afternoon agency agent aim airport alarm album alley
alligator almond ambulance anchor angel angle animal ankle answer antelope anthem apartment apron arch area argument
arm armchair arrow article artist ashtray aspect athlete atom attic auction aunt author autumn avenue award baboon
backpack badge badger bagel baker balcony ball ballad balloon ballot bandage banker banner barber barn baron barrel
barrier basement basin basketball bat bath bathroom battery battle bay beach bead beam bean beard beast beaver bedroom
beetle beggar beginner belief bell belt bench benefit bicycle bishop blackboard blanket blizzard blossom boat bone
bonfire bonnet book bookcase boot border boulder boundary bouquet bow bowl bracelet brain branch breeze brick bridge
broom brother bucket bullet bunker burger bush business butcher buttress cabbage cabin cabinet cable cage calendar
camel camera campfire canal candidate cannon canvas capital captain caravan card career cargo carpenter carpet carriage
carrot cart cartoon cave ceiling cellar centimetre century ceremony chain challenge chamber champion channel chapter
character chart cheek cheetah chef chest chicken chimney chipmunk church cinema citizen clarinet class classroom clerk
client cliff clock cloud clown club coach coast cobbler coconut coffin coin collar colleague collection college colony
column committee community company compass competition composer concert conductor cone conference contest continent
contract cook cookie corner corridor costume cottage couch council counter country courtyard cousin coyote crab cradle
crane crater crayon creature creek cricket crime crocodile crop crow crowd crown crystal cucumber culture cup cupboard
curtain cushion customer cyclist dagger daisy dancer daughter deadline dealer debt decade decision deck degree dentist
desert designer desk dessert detail detective device diamond diary dictionary dinosaur diploma director dish disk
distance district ditch document dollar donkey door dormitory drawer dream dress driver drum duchess eagle earring
earthquake eclipse editor egg elbow election emperor employee empress enemy engineer entrance envelope episode
escalator essay evening event exam example exit expert explorer eye eyebrow fabric face factory fairy falcon family
farm farmer father faucet favourite fence ferry festival fiddle field fighter figure film fireplace flag flame
flashlight fleet flood floor flute folder football footprint forehead fork fortress fountain fox fraction frame freckle
friend frog funnel galaxy gallery garage gardener garment gate gear general ghost giraffe girl glacier glove goal goat
goldfish gorilla governor grandfather grandmother grape grasshopper grave group guard guide gutter habit haircut
hallway hamster hand handkerchief handle harbour hat hawk headache headline heart hedge hedgehog heel hen herd hermit
highway hill hive hobby holiday hook horizon horn horse hotel hour human hurdle hurricane husband idea illness image
inch index infant inn instrument invention invitation iris item jar jaw jockey joke journal journey judge jug juggler
kangaroo kennel key keyboard kidney kilometre king kite knee knot laboratory lace lake lamb lamp landlord lane language
laser lawn lawyer layer leader league lecture leg legend lemon lens leopard lesson level lever liar lid lighthouse limb
line lion lip liquid list litre lizard llama lobster lock locker locomotive log lord lorry lunch machine magazine
magician magnet mailbox major mammal manager mansion map marathon marble margin mask mast master match mattress meadow
meal medal meeting member memory mermaid message metal meteor method microphone microscope midnight mile mill
millimetre miner minister minute miracle mission mistake mitten model moment monastery monster month monument moth
mother motor motorway mouth movie muscle museum mushroom musician nail name napkin nation neck neighbour nest net
nettle network newspaper night nightingale nightmare noise noodle nose notebook notice novel nurse nut oak oar object
octopus offer officer olive omelette onion opera opinion orchard orchestra organ organist ostrich otter outfit oven owl
owner packet paddle page pain painter palace pan pancake panda panther parachute parade paragraph parcel parent park
parrot partner passage passenger passport password pastry path patient pattern pavement peach peacock peanut pear
pebble pedal pedestrian pelican pen penguin penny percentage person petal pharmacy phone photograph physician pianist
picnic picture pie pigeon pillar pillow pilot pineapple pipe pirate pistol pitcher pizza planet plank plate platform
player playground plumber pocket poem poet policy pond pony pool poppy porch porcupine port portrait postcard poster
pot prairie president priest prince princess principle prison prisoner prize problem product professor programme
project promise prophet province pudding pumpkin pupil puppet puppy purse puzzle pyramid quarrel quarter question queue
quilt raccoon race racket radish raft railway rainbow raindrop raisin ranch rat raven razor recipe record reef region
relative religion reporter reptile republic rescue restaurant reward rhythm riddle ridge rifle ring roast robin robot
rod roof room rope rose route row ruler rumour sailor salad salary sandal satellite sauce saucepan sausage scale
scarecrow scene scholar scientist scooter scorpion screen screw script sculptor sea seagull season seat secret
secretary section seed senator sentence sergeant servant session shadow shark sheet shell shepherd shield ship shirt
shoe shop shoulder shovel shower shrimp sign signal signature singer sister skeleton skirt skull skyscraper slice
slipper slope snail snowflake sock sofa soldier son song soup source spaceship spear spectator speech sphere spire
sponge spoon spot spring squash squirrel stable stadium stair stall stamp star statement station statue steak stem step
stereo sticker stool storm story stove stranger strap street student studio submarine suburb success suit suitcase sun
supermarket surface surgeon surgery swallow swan sweater sword symbol symphony system tailor tale talent target tavern
taxi team teapot tear telephone telescope television temple tenant tent theatre theory thermos thorn thread throat
throne thumb tiger tile title toad toe tongue tool torch tortoise tournament towel tower town toy tractor trader
tradition tragedy trail train traitor tram traveller treasure treaty tribe trick trolley trophy trumpet trunk tube
tulip tunnel turtle tutor twig twin typewriter tyre umpire uniform universe university vacation vacuum valley vampire
vase vault vegetable vehicle vein veranda verse vessel victim victory view villain vine violet virus vision visitor
vitamin voice volunteer vote voyage vulture waist waiter waitress wall wallet walnut walrus wand wardrobe warehouse
warning warrior wasp watch waterfall wave way weapon weasel wedding week weekend weight well whale wheel wheelbarrow
whisker widow winner witch witness wizard woodpecker word worker workshop world worm wound wreath wrist writer yacht
yard year zone zoo
"""
VERBS = """
abandon accept ache achieve admire advise agree allow amuse announce annoy appear applaud approach argue arrange arrive
ask assist attach attack attempt attend attract avoid bake balance bark bathe behave belong blame bless blink boast
boil borrow bounce breathe bully burn bury calculate call camp capture care carry carve cause celebrate change charge
chase cheat check cheer chew choke chuckle claim clean clear climb close collapse collect comb command compare compete
complain complete concentrate concern confess confuse connect consider consist contain continue copy correct cough
count cover crack crash crawl create cross crush cry cure curl dance dare deceive decide decorate delay delight deliver
demand deny depend describe deserve design destroy develop disagree disappear discover discuss dislike dive divide
doubt dream dress drift drown dry dust earn educate employ empty encourage end enjoy enter entertain escape examine
excite excuse exercise exist expand expect explain explode explore express fade fail faint fancy fasten fear fetch fill
finish fire fix float flow fold follow fool force form frighten fry gather gaze glance glow grate grease greet groan
grumble guarantee guess hammer hand happen harm hate haunt heal heat help hesitate hope hover howl hunt hurry identify
ignore imagine impress improve include increase inform inject injure inspect instruct intend interest interfere
interrupt introduce invent invite irritate itch jail join joke juggle jump kick kill kiss knock label land last laugh
launch learn lick lift like listen live load loan lock long look love manage march mark marry match measure melt mend
mention miss mix moan modify mourn move multiply murder name need note notice notify number obey observe obtain occupy
offend offer open order overflow owe own pack paint park pass paste pause peel perform phone place plant play please
point polish possess post pour practise praise pray preach prepare present preserve press pretend prevent print produce
promise propose protect provide pull pump punch punish push question race rain raise reach realise receive recognise
record reduce reflect refuse regard reject relax release rely remain remember remind remove repair repeat replace reply
report reproduce request rescue retire return rhyme rinse risk roll row ruin rule rush sail satisfy save scatter scold
scorch scrape scratch scream search separate serve settle shade share shave shelter shiver shout shriek sigh sign smash
smell smile smoke sneeze sniff snore snow soak soothe sound spare spark sparkle spell spill spoil spray sprout squash
squeak squeeze stain stamp stare start stay steer stitch store strengthen stretch stroke stuff subtract succeed suffer
suggest supply support suppose surprise surround suspect switch talk tame taste tease tempt terrify test thank thaw
tickle tire touch tow trace trade train transform translate treat tremble trick trouble trust try tumble turn twist
type unite unlock unpack use vanish visit wail wait walk wander want warm warn wash waste water weigh welcome whine
whisper whistle wink wipe wish wobble wonder work worry wrestle wriggle yawn yell zoom
"""
ADJECTIVES = """
abrupt awkward bitter blind blunt bold brave brief bright brisk careful careless casual cautious cheap cheerful clever
clumsy coarse cold conscious cool correct crazy crisp cruel curious damp dark deaf deep dense devoted dim direct drowsy
dull eager easy exact faint fair faithful false fearful fearless feeble fierce firm flat fond foolish forgetful
forgiving fresh frosty full gentle gloomy graceful grateful greedy grim happy hard harmless harsh hasty healthy heavy
helpful helpless hopeful hopeless hungry idle joyful keen kind late lazy light loud lucky mad mean meek merry mild
moist naked narrow nasty neat nervous nice noisy numb odd open painful peaceful plain playful polite poor prompt proud
pure quick quiet rare rash restless rich rough rude ruthless sad selfish serious shallow sharp short sick sleepless
sleepy slow smooth sober soft solemn sore sour spiteful steady stern stiff strange strict stubborn sudden sweet swift
tactful tasteful tender tense thankful thick thin thirsty thorough thoughtful thoughtless tidy tight tired truthful
useful useless vague vast vivid warm wary watchful weak weary wet wicked wild willing wise youthful
"""
OTHERS = """
about above abroad absence across advice after again against algebra almost alone along already although altogether
always among ancient another anybody anything around artificial astronomy away bacon bamboo banjo because before behind
below beneath beside between beyond biology brought buffalo butter caught cement cereal cheese chemistry chess children
cinnamon clothes coffee comfortable cotton courage democratic different difficult dough during electric electricity
eleven emergency enormous enough enthusiasm equipment everybody everything evidence expensive fahrenheit fantastic
fifteen fifty flour forty fourteen freedom friendly fuel fundamental furniture garlic generous gentlemen geography
geometry giggling ginger golden grammar gravel gravity happiness heaven heroic history homework honest hundred hygiene
immediate important impossible independent information ingredients innocent intelligent interesting jealousy jewellery
justice knowledge laughter leather legislation leisure literature logic luggage lunar macaroni magic mahogany
mathematics mayonnaise medicine melancholy mischievous moisture molasses mustard natural necessary neither nineteen
nobody nothing nuclear nylon obvious occasion oxygen pajamas parallel parsley patience peculiar pepper perhaps physics
plastic poetry porridge poverty powerful practical precious previous probably psychology punctuation qualified
quicksilver quinine radiation rather ready reasonable rebellious reddish regular responsible rhubarb ridiculous
romantic rubber rubbish sandpaper science scissors seventeen seventy several silence silk sincere sixteen sixty
somebody somewhere spaghetti spinach strength sulphur sunlight sunshine supreme teeth temperature terrible thirteen
thirty thousand thunder tobacco together tomorrow traffic tremendous trousers truth twelve twenty ultimate underneath
unfortunate unusual upstairs valuable various vegetarian velocity vertical violence visible wealth weather whether
wilderness wisdom without women wonderful wooden yesterday youth
"""
VOWELS = "aeiou"


def with_s(word: str) -> str:
    """The plural of a noun, or a verb's third person."""
    if _consonant_y(word):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def noun(word: str) -> list[str]:
    return [word, with_s(word)]


def verb(word: str) -> list[str]:
    """With its third person, past and participle: "try" gives tries, tried, trying; "like" likes, liked, liking."""
    past = word[:-1] + "ied" if _consonant_y(word) else word.removesuffix("e") + "ed"
    silent = word.endswith("e") and not word.endswith(("ee", "oe", "ye"))
    return [word, with_s(word), past, (word[:-1] if silent else word) + "ing"]


def adjective(word: str) -> list[str]:
    """With its adverb and noun: "happy" gives happily, happiness; "gentle" gently, gentleness; "dull" dully."""
    stem = word[:-1] + "i" if _consonant_y(word) else word
    adverb = word[:-1] + "y" if word.endswith("le") else stem.removesuffix("l" * word.endswith("ll")) + "ly"
    return [word, adverb, stem + "ness"]


def _consonant_y(word: str) -> bool:
    return word.endswith("y") and word[-2] not in VOWELS


def split() -> tuple[list[str], list[str]]:
    """(words to train on, words held out): sorted, and disjoint."""
    trained: set[str] = set()
    held_out: set[str] = set()
    kinds = ((NOUNS, noun), (VERBS, verb), (ADJECTIVES, adjective), (OTHERS, lambda word: [word]))
    for text, forms in kinds:
        for stem in text.split():
            (held_out if Dice(f"stem {stem}").chance(10) else trained).update(forms(stem))
    return sorted(trained), sorted(held_out - trained)


TRAINED, HELD_OUT = split()
